package bench

import (
	"archive/tar"
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
)

func TestParseSubjects(t *testing.T) {
	for _, tt := range []struct {
		texts []string
		want  string // names, or part of the error
		fails bool
	}{
		{texts: []string{"overlayfs", "dedup"}, want: "overlayfs dedup"},
		{texts: []string{"all"}, want: "overlayfs native erofs dedup dedup-exact dedup-normalized"},
		{texts: []string{"dedup", "stargz=unix:///run/s.sock?root=/var/lib/s"}, want: "dedup stargz"},
		{texts: []string{"dedup", "dedup"}, want: "twice", fails: true},
		{texts: []string{"zfs"}, want: "want overlayfs", fails: true},
		{texts: []string{"a=/run/s.sock"}, want: "unix:///", fails: true},
		{texts: []string{"dedup=unix:///run/s.sock"}, want: "not taken", fails: true},
	} {
		t.Run(strings.Join(tt.texts, ","), func(t *testing.T) {
			subjects, err := ParseSubjects(tt.texts)
			if tt.fails {
				if err == nil || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("error is %v, want %q in it", err, tt.want)
				}
				return
			}
			var names []string
			for _, s := range subjects {
				names = append(names, s.Name)
			}
			if got := strings.Join(names, " "); err != nil || got != tt.want {
				t.Errorf("subjects are %s, %v, want %s", got, err, tt.want)
			}
		})
	}
	subjects, err := ParseSubjects([]string{"stargz=unix:///run/s.sock?root=/var/lib/s"})
	want := []Subject{{Name: "stargz", Snapshotter: "stargz", Socket: "/run/s.sock", Root: "/var/lib/s"}}
	if diff := cmp.Diff(want, subjects); err != nil || diff != "" {
		t.Errorf("%v (-want +got):\n%s", err, diff)
	}
}

// What is left of a chosen group's time grows with what the trials so far have really taken.
func TestEstimate(t *testing.T) {
	e := newEstimate([]group{{seconds: 10}, {seconds: 5}}, Options{Runs: 2, Subjects: make([]Subject, 2)})
	if left := e.took(10 * time.Second); left != 50*time.Second { // 3 of 10 s, 4 of 5 s
		t.Errorf("%s are left, want 50s", left)
	}
	if left := e.took(30 * time.Second); left != 80*time.Second { // twice as slow as expected
		t.Errorf("%s are left, want 1m20s", left)
	}
	e.done()
	if left := e.took(10 * time.Second); left != 30*time.Second {
		t.Errorf("%s are left, want 30s", left)
	}
}

// Layers that the first image has brought are not part of what limits the second.
func TestNewTo(t *testing.T) {
	cold := Image{Blobs: []string{"/one/sha256/a", "/one/sha256/b"}}
	got := newTo([]Image{{Blobs: []string{"/two/sha256/a", "/two/sha256/c"}}, {Blobs: []string{"/two/sha256/c"}}}, cold)
	if diff := cmp.Diff([][]string{{"/two/sha256/c"}, nil}, [][]string{got[0].Blobs, got[1].Blobs}); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// All of a stream is read, whatever its length, and an error of it is told.
func TestHashTwice(t *testing.T) {
	for _, size := range []int{0, 1, 1 << 20, 20<<20 + 1} {
		r := bytes.NewReader(make([]byte, size))
		if err := hashTwice(r); err != nil || r.Len() != 0 {
			t.Errorf("%d bytes: %d unread, %v", size, r.Len(), err)
		}
	}
	if err := hashTwice(io.MultiReader(bytes.NewReader(make([]byte, 100)), broken{})); err == nil {
		t.Error("an error was lost")
	}
}

type broken struct{}

func (broken) Read([]byte) (int, error) { return 0, fmt.Errorf("broken") }

// Of files of the same size as many are taken as bytes are wanted, and copies where there are too few.
func TestSized(t *testing.T) {
	files := make([]payload, 100)
	for i := range files {
		files[i] = payload{header: tar.Header{Name: fmt.Sprint(i), Size: 10}}
	}
	for want, copies := range map[int64]int{100: 0, 1000: 0, 2500: 2} {
		got := sized(files, 1000, want)
		if len(got) < int(want/10)-1 || len(got) > int(want/10) {
			t.Errorf("%d files for %d bytes", len(got), want)
		}
		if last := got[len(got)-1].copy; last != copies {
			t.Errorf("%d bytes: the last file is of copy %d, want %d", want, last, copies)
		}
	}
}

// Another build has other owners and times everywhere, also inside of compiled files, and the same
// payloads otherwise.
func TestRebuilt(t *testing.T) {
	const site = "usr/local/lib/python3.11/dist-packages/"
	pyc := "magi\x00\x00\x00\x00" + string(binary.LittleEndian.AppendUint32(nil, 1000)) + "sizecode"
	l, err := image.FromEntries(t.TempDir(), image.LayerOptions{},
		image.Dir("usr"), image.Entry{Name: site + "Wanted/a.py", Content: "a", Time: time.Unix(1000, 0)},
		image.File(site+"Wanted/a.pyc", pyc), image.File(site+"wanted-1.0.dist-info/RECORD", "r"),
		image.File(site+"other/b.py", "b"))
	if err != nil {
		t.Fatal(err)
	}
	again, err := image.NewLayer(t.TempDir(), image.LayerOptions{}, func(w io.Writer) error {
		return rebuilt(w, l, 2, func(pkg string) bool { return pkg == "wanted" })
	})
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	err = eachMember(again, func(h *tar.Header, tr *tar.Reader) error {
		names = append(names, strings.TrimPrefix(h.Name, site))
		data, err := io.ReadAll(tr)
		if strings.HasPrefix(h.Name, site) && (h.Uid != 1002 || h.Gid != 1002) {
			t.Errorf("%s belongs to %d:%d", h.Name, h.Uid, h.Gid)
		}
		if strings.HasSuffix(h.Name, "a.py") && h.ModTime.Unix() != 1000+7200 {
			t.Errorf("%s is of %d", h.Name, h.ModTime.Unix())
		}
		if strings.HasSuffix(h.Name, ".pyc") {
			if got := binary.LittleEndian.Uint32(data[8:]); got != 1000+7200 || string(data[12:]) != pyc[12:] {
				t.Errorf("%s has mtime %d", h.Name, got)
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"usr/", "Wanted/a.py", "Wanted/a.pyc", "wanted-1.0.dist-info/RECORD", "build"}
	if diff := cmp.Diff(want, names); diff != "" {
		t.Errorf("members (-want +got):\n%s", diff)
	}
}

// What a killed benchmark left is removed by the next, what a living one uses is not.
func TestSweep(t *testing.T) {
	parent := t.TempDir()
	make := func(name string) string {
		dir := filepath.Join(parent, diskPattern+name)
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	dead, alive := make("dead"), make("alive")
	release, err := own(dead)
	if err != nil {
		t.Fatal(err)
	}
	release() // as the kernel does for who is killed
	if release, err = own(alive); err != nil {
		t.Fatal(err)
	}
	defer release()
	sweep(parent)
	left, _ := filepath.Glob(filepath.Join(parent, "*"))
	if !slices.Equal(left, []string{alive}) {
		t.Errorf("left are %v, want %s", left, alive)
	}
}

// Benchmarks that run side by side sweep while others make their directories.
func TestSweepBesideOthers(t *testing.T) {
	parent := t.TempDir()
	stop, swept := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(swept)
		for {
			select {
			case <-stop:
				return
			default:
				sweep(parent)
			}
		}
	}()
	for range 500 {
		dir, release, err := newOwned(parent, diskPattern)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "image"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
		release()
	}
	close(stop)
	<-swept
}
