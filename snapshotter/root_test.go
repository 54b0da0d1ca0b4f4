package snapshotter

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// The root is its owner's alone, also one that was there before; one that is not the daemon's alone is refused
// where others can write.
func TestSecureRoot(t *testing.T) {
	for _, row := range []struct {
		name  string
		mode  os.FileMode
		files []string
		uid   int
		want  os.FileMode
		err   string
	}{
		{name: "new and open", mode: 0o777, want: 0o700},
		{name: "an empty file system", mode: 0o755, files: []string{"lost+found"}, want: 0o700},
		{name: "a store", mode: 0o777, files: []string{"format", "layers"}, want: 0o700},
		{name: "closed", mode: 0o700, files: []string{"format"}, want: 0o700},
		{name: "others' files", mode: 0o755, files: []string{"data"}, want: 0o755},
		{name: "others' files, and open", mode: 0o1777, files: []string{"data"}, err: "set root to a directory of its own"},
		{name: "another's", mode: 0o755, uid: 1000, err: "belongs to uid 1000"},
	} {
		t.Run(row.name, func(t *testing.T) {
			root := filepath.Join(t.TempDir(), "root")
			if err := os.Mkdir(root, 0o700); err != nil {
				t.Fatal(err)
			}
			for _, name := range row.files {
				if err := os.WriteFile(filepath.Join(root, name), nil, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if row.uid > 0 {
				needRoot(t)
				if err := os.Chown(root, row.uid, -1); err != nil {
					t.Fatal(err)
				}
			}
			if err := os.Chmod(root, row.mode&0o777|row.mode&0o1000<<11); err != nil {
				t.Fatal(err)
			}
			err := secureRoot(root)
			if row.err != "" {
				if err == nil || !strings.Contains(err.Error(), row.err) || !strings.Contains(err.Error(), root) {
					t.Errorf("%v", err)
				}
				return
			}
			fi, serr := os.Stat(root)
			if err != nil || serr != nil || fi.Mode().Perm() != row.want {
				t.Errorf("mode %v, %v, %v", fi.Mode(), err, serr)
			}
		})
	}
}
