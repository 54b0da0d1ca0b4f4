package lower

import (
	"errors"
	"os"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// A view of a chain shows what its containers see, in one directory, for as long as the image is mounted.
func TestView(t *testing.T) {
	inAllKinds(t, func(t *testing.T, l *lab) {
		layer := l.ingest(map[string]string{"a": text("a"), "b/c": text("c")})
		b := l.ensure(layer)
		var at string
		for range 2 { // mounted once
			dir, err := l.View(t.Context(), b.Chain)
			if err != nil {
				t.Fatal(err)
			}
			if got := readFile(t, dir, "a") + readFile(t, dir, "b/c"); got != text("a")+text("c") {
				t.Errorf("%d bytes", len(got))
			}
			if got := namesIn(t, dir); !slices.Equal(got, []string{"a", "b"}) {
				t.Errorf("root: %v", got)
			}
			if err := os.WriteFile(dir+"/new", nil, 0o644); !errors.Is(err, unix.EROFS) {
				t.Errorf("write: %v", err)
			}
			at = dir
		}
		if err := l.Release(t.Context(), l.Name([]content.LayerID{layer}, Plain)); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(at); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("after the last user: %v", err)
		}
		if _, err := l.View(t.Context(), b.Chain); err == nil {
			t.Error("an image that is not mounted has a view")
		}
	})
}
