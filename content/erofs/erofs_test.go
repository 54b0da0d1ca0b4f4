package erofs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/tree"
)

func TestRoundTripGoErofs(t *testing.T) {
	forEachUnit(t, func(t *testing.T, unit blocks) {
		root, _ := torture(unit)
		compare(t, wanted(root, nil), readGo(t, root, unit))
	})
}

// TestRoundTripSmallImages looks at the ends of images: one of few blocks, with the last
// inode in the last slot, is where readers run past the end.
func TestRoundTripSmallImages(t *testing.T) { forEachUnit(t, testRoundTripSmallImages) }

func testRoundTripSmallImages(t *testing.T, unit blocks) {
	for n := range 200 {
		var nodes []*tree.Node
		for i := range n {
			e := withXattrs(entry(content.Fifo), content.Xattr{Name: "user.shared", Value: []byte("same everywhere")})
			nodes = append(nodes, leaf(fmt.Sprint(i), e))
		}
		root := dir("", nodes...)
		compare(t, wanted(root, nil), readGo(t, root, unit))
	}
}

func TestRoundTripRandom(t *testing.T) { forEachUnit(t, testRoundTripRandom) }

func testRoundTripRandom(t *testing.T, unit blocks) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	for range 20 {
		o := make(objects)
		root := dir("", randomNodes(rnd, o, 3, nil)...)
		compare(t, wanted(root, nil), readGo(t, root, unit))
	}
}

// randomNodes makes the children of a directory; earlier holds entries to link to.
func randomNodes(rnd *rand.Rand, o objects, depth int, earlier []*content.Entry) []*tree.Node {
	names := make(map[string]*tree.Node)
	for range rnd.IntN(40) {
		name := string(text(1+rnd.IntN(30)*rnd.IntN(9), rnd.IntN(1000)))
		if depth > 0 && rnd.IntN(4) == 0 {
			names[name] = dir(name, randomNodes(rnd, o, depth-1-rnd.IntN(depth), earlier)...)
			continue
		}
		var e *content.Entry
		switch rnd.IntN(6) {
		case 0:
			e = symlink(string(text(1+rnd.IntN(maxTarget), rnd.Int())))
		case 1:
			e = hole(1 + rnd.Int64N(maxHole(dense)))
		case 2:
			if len(earlier) > 0 {
				names[name] = leaf(name, earlier[rnd.IntN(len(earlier))])
				continue
			}
			e = entry(content.Socket)
		default:
			e = o.file(text(rnd.IntN(content.InlineMax), rnd.Int()))
		}
		e.UID, e.Mtime.Sec = uint32(rnd.IntN(2)*100_000), int64(rnd.IntN(3))
		for i := range rnd.IntN(4) * rnd.IntN(2) {
			e.Xattrs = append(e.Xattrs, content.Xattr{Name: fmt.Sprint("user.x", i), Value: text(rnd.IntN(3)*rnd.IntN(2000), 1)})
		}
		earlier = append(earlier, e)
		names[name] = leaf(name, e)
	}
	var nodes []*tree.Node
	for _, n := range names {
		nodes = append(nodes, n)
	}
	return nodes
}

// TestManyLinks has one more name than a compact inode can count.
func TestManyLinks(t *testing.T) {
	const links = math.MaxUint16 + 1
	e := objects{}.file(text(500, 1))
	var names []*tree.Node
	for i := range links {
		names = append(names, leaf(fmt.Sprint(i), e))
	}
	fsys := openGo(t, dir("", names...), dense)
	for _, name := range []string{"0", "65535", "9"} {
		s, err := statGo(fsys, name, firstNames[int64]{})
		if err != nil {
			t.Fatal(err)
		}
		if s.Nlink != links || s.Data != string(e.Data) {
			t.Errorf("%s: %d links and %d bytes, want %d and %d", name, s.Nlink, len(s.Data), links, len(e.Data))
		}
	}
}

func TestFsck(t *testing.T) {
	fsck, err := exec.LookPath("fsck.erofs")
	if err != nil {
		t.Skip("fsck.erofs is not installed (package erofs-utils)")
	}
	forEachUnit(t, func(t *testing.T, unit blocks) {
		fsckReads(t, fsck, unit)
		full, _ := torture(unit)
		for name, root := range map[string]*tree.Node{"torture": full, "empty": dir("")} {
			t.Run(name, func(t *testing.T) {
				args := []string{"-d3", writeTemp(t, "image.erofs", build(t, root, unit))}
				for _, p := range options(root, unit).Packs {
					args = append(args, "--device="+writeTemp(t, p.Pack.String(), nil))
				}
				out, err := exec.Command(fsck, args...).CombinedOutput()
				if err != nil || !bytes.Contains(out, []byte("No errors found")) {
					t.Fatalf("fsck.erofs: %v\n%s", err, out)
				}
			})
		}
	})
}

func TestMount(t *testing.T) {
	needRoot(t)
	forEachUnit(t, func(t *testing.T, unit blocks) {
		root, _ := torture(unit)
		hasData := func(s seen) bool { return s.Xattrs["trusted.overlay.redirect"] == "" }
		for way := range waysToMount {
			compare(t, wanted(root, nil), readKernel(t, mountImage(t, way, root, unit), hasData))
		}
	})
}

// TestMountOverlay mounts an image over objects, as a container sees it.
func TestMountOverlay(t *testing.T) { forEachUnit(t, testMountOverlay) }

func testMountOverlay(t *testing.T, unit blocks) {
	needRoot(t)
	root, o := torture(unit)
	store, places := t.TempDir(), options(root, unit)
	for id, data := range o {
		place, _ := places.Place(id)
		file := filepath.Join(store, PackPath(place.Pack, place.N))
		if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	merged := mountOverlay(t, mountImage(t, "file", root, unit)+"::"+store)

	want := wanted(root, o)
	byPath := make(map[string]seen)
	for _, s := range want {
		byPath[s.Path] = s
	}
	compare(t, want, readKernel(t, merged, func(s seen) bool { return byPath[s.Path].Data != "" }))
}

func TestDeterministic(t *testing.T) { forEachUnit(t, testDeterministic) }

func testDeterministic(t *testing.T, unit blocks) {
	first, _ := torture(unit)
	want := build(t, first, unit)
	for range 3 {
		again, _ := torture(unit) // other pointers, other map order
		if !bytes.Equal(want, build(t, again, unit)) {
			t.Fatal("two images of equal trees differ")
		}
	}
	other := build(t, dir("", leaf("a", entry(content.Fifo))), unit)
	if uuid := superOffset + superUUIDOff; bytes.Equal(other[uuid:uuid+16], want[uuid:uuid+16]) {
		t.Error("two images of different trees have one uuid")
	}
}

// TestEqualMtimeCounts has two mtimes that are equally common, so that a choice by map
// order would show.
func TestEqualMtimeCounts(t *testing.T) {
	late, early := entry(content.Fifo), entry(content.Fifo)
	late.Mtime.Sec += 2
	early.Mtime = content.Time{Sec: -5}
	root := dir("", leaf("a", late), leaf("b", early))
	want := build(t, root, coarse)
	for range 50 {
		if !bytes.Equal(want, build(t, root, coarse)) {
			t.Fatal("two images of one tree differ")
		}
	}
}

// TestSize holds the sizes that decide how large real images are.
func TestSize(t *testing.T) {
	const files = 1000
	label := content.Xattr{Name: "security.selinux", Value: []byte("system_u:object_r:container_file_t:s0")}
	for _, row := range []struct {
		name string
		make func(i int) *content.Entry
		want int64 // bytes an inode
	}{
		{"object, common mtime", func(i int) *content.Entry { return hole(int64(i + 2000)) }, 128},
		{"object, own mtime", func(i int) *content.Entry {
			return with(hole(int64(i+2000)), func(e *content.Entry) { e.Mtime.Sec += int64(i) })
		}, 160},
		{"device, large uid", func(int) *content.Entry {
			return with(device(content.Block, 8, 1), func(e *content.Entry) { e.UID = 1 << 20 })
		}, 64},
		{"inline 32", func(i int) *content.Entry { return objects{}.file(text(32, i)) }, 64},
		{"inline 640, six a block", func(i int) *content.Entry { return objects{}.file(text(640, i)) }, 4096 / 6},
		{"label", func(int) *content.Entry { return withXattrs(entry(content.Fifo), label) }, 64},
	} {
		t.Run(row.name, func(t *testing.T) {
			var nodes []*tree.Node
			for i := range files {
				nodes = append(nodes, leaf(fmt.Sprintf("%04d", i), row.make(i)))
			}
			got := int64(len(build(t, dir("", nodes...), coarse)))
			want := row.want*files + files*(direntSize+4)
			if got > want+3*blockSize || got < want-2*blockSize {
				t.Errorf("%d bytes, want about %d", got, want)
			}
		})
	}
}

// TestGapsAreFilled mixes lengths, so that small files fit where large ones did not.
func TestGapsAreFilled(t *testing.T) {
	var nodes []*tree.Node
	var need int64
	for i := range 2000 {
		size := [...]int{700, 100, 250}[i%3]
		nodes = append(nodes, leaf(fmt.Sprintf("%04d", i), objects{}.file(text(size, i))))
		need += alignUp(int64(compactSize+size), slotSize) + direntSize + 4
	}
	if got := int64(len(build(t, dir("", nodes...), coarse))); got > need+need/20 {
		t.Errorf("%d bytes for %d bytes of inodes and names", got, need)
	}
}

func TestRefused(t *testing.T) {
	xattr := func(name string, size int) *content.Entry {
		return withXattrs(entry(content.Fifo), content.Xattr{Name: name, Value: make([]byte, size)})
	}
	var tooMuch []content.Xattr
	for i := range 5 {
		tooMuch = append(tooMuch, content.Xattr{Name: fmt.Sprint("user.", i), Value: make([]byte, 60_000)})
	}
	for _, row := range []struct {
		name  string
		entry *content.Entry
		want  string
	}{
		{"overlay redirect", xattr("trusted.overlay.redirect", 5), "overlayfs"},
		{"overlay anything", xattr("trusted.overlay.", 0), "overlayfs"},
		{"whiteout device", device(content.Char, 0, 0), "whiteout"},
		{"foreign name space", xattr("lustre.x", 1), "lustre.x"},
		{"system name space", xattr("system.nfs4_acl", 1), "system.nfs4_acl"},
		{"ACL with more", xattr("system.posix_acl_access.x", 1), "posix_acl_access.x"},
		{"xattr without a name", xattr("user.", 1), "user."},
		{"xattr name with NUL", xattr("user.a\x00b", 1), `a\x00b`},
		{"xattr name of 256 bytes", xattr("user."+strings.Repeat("n", 251), 1), "256 bytes"},
		{"xattr value of 64 KiB", xattr("user.big", 65536), "65536"},
		{"300 KB of xattrs", withXattrs(entry(content.Fifo), tooMuch...), "256 KiB"},
		{"size of 1 PiB and a byte", hole(maxSize + 1), "fits"},
		{"size of 8 EiB", hole(1<<63 - 1), "fits"},
		{"negative size", hole(-1), "size -1"},
		{"size unlike data", with(objects{}.file(text(5, 1)), func(e *content.Entry) { e.Size = 6 }), "5 bytes of data"},
		{"too much data", &content.Entry{Kind: content.Regular, Size: 1025, Data: text(1025, 1)}, "1025 bytes"},
		{"no payload", &content.Entry{Kind: content.Regular, Size: 7}, "neither"},
		{"major too large", device(content.Block, 4096, 0), "4096"},
		{"minor too large", device(content.Char, 1, 1<<20), "1048576"},
		{"empty target", symlink(""), "without a target"},
		{"long target", symlink(strings.Repeat("t", 4096)), "4096 bytes"},
		{"target with NUL", symlink("a\x00b"), "NUL"},
		{"mode", with(entry(content.Fifo), func(e *content.Entry) { e.Mode = 0o10644 }), "mode"},
		{"nanoseconds", with(entry(content.Fifo), func(e *content.Entry) { e.Mtime.Nsec = 1e9 }), "nanoseconds"},
		{"hardlink", entry(content.Hardlink), "kind 7"},
		{"lower link", entry(content.LowerLink), "kind 8"},
		{"whiteout", entry(content.Whiteout), "kind 9"},
		{"no kind", entry(0), "kind 0"},
		{"no entry", nil, "no entry"},
	} {
		t.Run(row.name, func(t *testing.T) {
			var w bytes.Buffer
			_, err := WriteChain(t.Context(), &w, dir("", dir("some", leaf("where", row.entry))), noPacks)
			if err == nil || !strings.Contains(err.Error(), row.want) || !strings.Contains(err.Error(), `"/some/where"`) {
				t.Errorf("got %v, want an error about %q at /some/where", err, row.want)
			}
			if w.Len() > 0 {
				t.Errorf("%d bytes were written", w.Len())
			}
		})
	}
}

func TestRefusedTrees(t *testing.T) {
	fifo := func(name string) *tree.Node { return leaf(name, entry(content.Fifo)) }
	unsorted := dir("", fifo("a"), fifo("b"))
	slices.Reverse(unsorted.Children)
	deepFifo := fifo("f")
	deepFifo.Children = []*tree.Node{fifo("x")}
	for _, row := range []struct {
		name string
		root *tree.Node
		want string
	}{
		{"nil", nil, "no root"},
		{"no entry", &tree.Node{}, "no root"},
		{"file as root", fifo(""), "not a directory"},
		{"whiteout xattr on the root",
			&tree.Node{Entry: withXattrs(entry(content.Dir), content.Xattr{Name: "trusted.overlay.opaque"})}, `"/": `},
		{"unsorted", unsorted, "out of order"},
		{"twice the same name", dir("", fifo("a"), fifo("a")), "out of order"},
		{"no name", dir("", fifo("")), "not a file name"},
		{"dot", dir("", fifo(".")), "not a file name"},
		{"dot dot", dir("", fifo("..")), "not a file name"},
		{"slash", dir("", fifo("a/b")), "not a file name"},
		{"NUL", dir("", fifo("a\x00")), "not a file name"},
		{"long name", dir("", fifo(strings.Repeat("n", 256))), "256 bytes"},
		{"children of a fifo", dir("", deepFifo), "not a directory"},
	} {
		t.Run(row.name, func(t *testing.T) {
			_, err := WriteChain(t.Context(), &bytes.Buffer{}, row.root, noPacks)
			if err == nil || !strings.Contains(err.Error(), row.want) {
				t.Errorf("got %v, want an error about %q", err, row.want)
			}
		})
	}
}

type fullDisk struct{}

func (fullDisk) Write([]byte) (int, error) { return 0, unix.ENOSPC }

func TestWriteError(t *testing.T) {
	if _, err := WriteChain(t.Context(), fullDisk{}, dir(""), noPacks); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("got %v, want ENOSPC", err)
	}
}

func needRoot(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts")
	}
}

// A write that nobody waits for any more ends, and writes nothing.
func TestWriteStops(t *testing.T) {
	gone := errors.New("the client has gone")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(gone)
	var b bytes.Buffer
	packages := sitePackages(10_000)
	if _, err := WriteChain(ctx, &b, packages, options(packages, coarse)); !errors.Is(err, gone) || b.Len() > 0 {
		t.Error(b.Len(), err)
	}
}
