package lower

import (
	"os"
	"path/filepath"
	"sync"
	"testing"
)

// What removes abandoned directories all the time takes none that is in use.
func TestProbeDir(t *testing.T) {
	root := t.TempDir()
	abandoned := filepath.Join(root, ProbePrefix+"1")
	if err := os.MkdirAll(filepath.Join(abandoned, "sub"), 0o700); err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	var cleaner sync.WaitGroup
	cleaner.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			old, _ := filepath.Glob(filepath.Join(root, ProbePrefix+"*"))
			for _, dir := range old {
				if release, ok := ClaimAbandoned(dir); ok {
					if err := os.RemoveAll(dir); err != nil {
						t.Error(err)
					}
					release()
				}
			}
		}
	})
	for range 500 {
		dir, release, err := ProbeDir(root, ProbePrefix)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"a", "b", "c"} {
			if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
		release()
	}
	close(stop)
	cleaner.Wait()
	if _, err := os.Stat(abandoned); !os.IsNotExist(err) {
		t.Errorf("an abandoned directory is still there: %v", err)
	}
}
