package lower

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// Whoever is told of a chain finds the metadata of its image and its packs in memory, and no payloads.
func TestMetadataIsReadAhead(t *testing.T) {
	inAllKinds(t, func(t *testing.T, l *lab) {
		if l.opts.Kernel.Loop {
			t.Skip("loop devices are not read ahead")
		}
		files := map[string]string{"large": strings.Repeat("a large payload ", 1<<18)}
		for i := range 2000 {
			files[fmt.Sprintf("some/directory/%04d", i)] = text(fmt.Sprint(i))
		}
		one := l.ingest(files)
		l.ensure(one)
		l.drops.Wait()
		n := l.Name([]content.LayerID{one}, Plain)
		image, pack := l.Images.Path(n), l.Chains.mounts.packs.path(l.Images.known(n).ids()[0])
		dropPages(t, image, pack)
		l.ensure(one)
		l.drops.Wait()

		want := int(metadataLen(t, pack) / 4096)
		if !l.Images.known(n).shared {
			want = 0
		}
		for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
			in, of := resident(t, image)
			inPack, _ := resident(t, pack)
			if in == of && inPack >= want && inPack < want+256 {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("%d of %d pages of the image are in memory, and %d of the pack, want %d", in, of, inPack, want)
			}
		}
	})
}

func metadataLen(t *testing.T, pack string) int64 {
	t.Helper()
	f, err := os.Open(pack)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	_, length, err := packMetadata(f, fi.Size())
	if err != nil || length < 2000*32 {
		t.Fatalf("%d bytes of metadata, %v", length, err)
	}
	return length
}
