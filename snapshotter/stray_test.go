package snapshotter

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// Containers that start and end beside a check are not reported, nor is what they have just left.
func TestCheckBesideContainers(t *testing.T) {
	s := open(t, t.TempDir())
	name, _ := unpack(t, s, "one", "", layerTar(t, map[string]string{"file": strings.Repeat("text", 5000)}), nil)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-stop:
					return
				default:
				}
				key := fmt.Sprintf("container-%d-%d", i, n)
				if _, err := s.Prepare(t.Context(), key, name); err != nil {
					t.Error(err)
					return
				}
				if err := s.Remove(t.Context(), key); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for range 15 {
		found, err := s.Check(t.Context(), CheckOptions{})
		if err != nil || len(found) > 0 {
			t.Errorf("%+v, %v", found, err)
		}
	}
	close(stop)
	wg.Wait()
	// What is really left behind is found.
	stray := filepath.Join(s.opts.Root, dirSnapshots, "1234567")
	if err := os.Mkdir(stray, 0o700); err != nil {
		t.Fatal(err)
	}
	found, err := s.Check(t.Context(), CheckOptions{})
	if err != nil || len(found) != 1 || found[0].Path != stray {
		t.Errorf("%+v, %v", found, err)
	}
}
