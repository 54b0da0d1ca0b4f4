package layer

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/erofs"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/object"
)

// openQuiet opens a store under a kernel that mounts dense packs or not. Packs are merged only when a test says so.
func openQuiet(t *testing.T, root string, opts Options, live ...content.LayerID) *Store {
	t.Helper()
	opts.Root = root
	s, err := Open(t.Context(), opts, live)
	if err != nil {
		t.Fatal(err)
	}
	s.keeper.stop()
	t.Cleanup(func() { closeStore(t, s) })
	return s
}

// denseLayers fills a store with layers of small files, each in a dense pack, and closes it.
func denseLayers(t *testing.T, root string, n int) (ids []content.LayerID, tars [][]byte) {
	t.Helper()
	s := openQuiet(t, root, Options{Dense: true})
	for i := range n {
		var members []member
		for j := range 20 {
			members = append(members, member{name: fmt.Sprint("own-", j), data: smallText(i, j)})
		}
		members = append(members, member{name: "shared", data: big(fmt.Sprint("shared", i/2))})
		tar := makeTar(t, members...)
		ids, tars = append(ids, ingest(t, s, tar).Layer), append(tars, tar)
	}
	if got := densePacks(t, s); got != n {
		t.Fatalf("%d packs are dense", got)
	}
	closeStore(t, s)
	return ids, tars
}

func smallText(i, j int) string { return strings.Repeat(fmt.Sprintf("%d-%d ", i, j), 150+20*j) }

func densePacks(t *testing.T, s *Store) (n int) {
	t.Helper()
	paths, err := filepath.Glob(s.path(dirPacks, "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range paths {
		b := readFile(t, path)
		p, err := erofs.OpenPack(strings.NewReader(string(b)), int64(len(b)))
		if err != nil {
			t.Fatal(err)
		}
		if p.Dense {
			n++
		}
	}
	return n
}

// objectsOf are what a chain image of layers names.
func objectsOf(t *testing.T, s *Store, chain ...content.LayerID) []content.ObjectID {
	t.Helper()
	root, err := s.Merge(t.Context(), chain)
	if err != nil {
		t.Fatal(err)
	}
	return root.Objects()
}

// leavesNothing checks that nothing is staged, and all is whole and in service.
func leavesNothing(t *testing.T, s *Store, ids []content.LayerID, tars [][]byte) {
	t.Helper()
	if left, _ := filepath.Glob(s.path(dirIngest, "*")); len(left) > 0 {
		t.Errorf("left in staging: %q", left)
	}
	expectService(t, s, ids, nil, tars)
	if found := checkStore(t, s); len(found) > 0 {
		t.Errorf("%+v", found)
	}
}

// Many who need the same dense packs at the same time get places in one copy of each, while the whole store is being
// rewritten.
func TestDensePacksAreCopiedOnce(t *testing.T) {
	root := t.TempDir()
	ids, tars := denseLayers(t, root, 6)
	s := openQuiet(t, root, Options{}, ids...)
	dense := s.Packs().Stats().Live
	chains := [][]content.LayerID{ids[:1], ids[:3], ids[1:4], ids[2:], ids, ids[5:], ids[:5], ids[3:4]}
	errs := make(chan error, 3*len(chains)+1)
	for i := range 3 * len(chains) {
		want := objectsOf(t, s, chains[i%len(chains)]...)
		go func() {
			placed, err := s.Places(t.Context(), want)
			if err == nil && placed.Dense() {
				err = errors.New("the image is to have small blocks")
			}
			for _, id := range want {
				if err != nil {
					break
				}
				if at, ok := placed.Place(id); !ok || at.Offset%content.BlockSize != 0 {
					err = fmt.Errorf("%s lies at %+v, %v", id, at, ok)
				}
			}
			if placed != nil {
				err = errors.Join(err, placed.Release())
			}
			errs <- err
		}()
	}
	go func() { errs <- s.Compact(t.Context()) }()
	for range cap(errs) {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	if st := s.Packs().Stats(); st.Merged != dense || st.Dead != 0 {
		t.Errorf("%d bytes lay in dense packs: %+v", dense, st)
	}
	if n := densePacks(t, s); n != 0 {
		t.Errorf("%d packs are dense", n)
	}
	leavesNothing(t, s, ids, tars)
}

// Who needs a dense pack waits for the merge that is going on, not for the whole store to be rewritten; and no longer
// than its ctx.
func TestPlacesWaitForOneMerge(t *testing.T) {
	root := t.TempDir()
	ids, tars := denseLayers(t, root, 12)
	var merges atomic.Int64
	merging := make(chan func()) // is sent how to let the merge go on
	s := openQuiet(t, root, Options{Step: func(name string) {
		if name == "merge.copied" {
			merges.Add(1)
			wait := make(chan struct{})
			merging <- func() { close(wait) }
			<-wait
		}
	}}, ids...)
	want := objectsOf(t, s, ids[11])
	s.compactor = object.NewCompactor(s.objects, object.CompactOptions{
		Sync: s.watch, Room: func() int64 { return 150 << 10 }, // for one at a time
	})
	compacted, placed := make(chan error, 1), make(chan error, 1)
	go func() { compacted <- s.Compact(t.Context()) }()
	var goOn func()
	select {
	case goOn = <-merging:
	case err := <-compacted:
		t.Fatalf("nothing was merged: %v", err)
	}

	ctx, cancel := context.WithCancelCause(t.Context())
	reason := errors.New("the client has gone")
	places := func(ctx context.Context) {
		p, err := s.Places(ctx, want)
		if err == nil {
			err = p.Release()
		}
		placed <- err
	}
	waits := waitingCtx{Context: ctx, waits: make(chan struct{}, 10)}
	go places(waits)
	<-waits.waits
	cancel(reason)
	if err := <-placed; !errors.Is(err, reason) || !errors.Is(err, object.ErrTooDense) {
		t.Errorf("cancelled: %v", err)
	}
	waits = waitingCtx{Context: t.Context(), waits: make(chan struct{}, 10)}
	go places(waits)
	<-waits.waits
	var at int64
	for done := 0; done < 2; {
		goOn()
		select {
		case goOn = <-merging:
			continue
		case err := <-placed:
			if at = merges.Load(); err != nil {
				t.Error(err)
			}
		case err := <-compacted:
			if err != nil {
				t.Error(err)
			}
		}
		done, goOn = done+1, func() {}
	}
	if all := merges.Load(); all != 12 || at > 5 { // one or two may have begun when this heard of it
		t.Errorf("who waited from the first of %d merges on went on after %d", all, at)
	}
	leavesNothing(t, s, ids, tars)
}

// waitingCtx tells that somebody is about to wait for it.
type waitingCtx struct {
	context.Context
	waits chan struct{}
}

func (c waitingCtx) Done() <-chan struct{} {
	c.waits <- struct{}{}
	return c.Context.Done()
}

// askedCtx calls a function each time that it is asked whether it has ended.
type askedCtx struct {
	context.Context
	asked func() error
}

func (c askedCtx) Err() error { return c.asked() }

// A copy ends soon after its ctx does, wherever it is, and leaves nothing.
func TestCopyEndsWithItsCtx(t *testing.T) {
	root := t.TempDir()
	ids, tars := denseLayers(t, root, 2)
	s := openQuiet(t, root, Options{}, ids...)
	want := objectsOf(t, s, ids...)
	for n := int64(0); ; n += 7 {
		var asked int64
		placed, err := s.Places(askedCtx{t.Context(), func() error {
			if asked++; asked > n {
				return context.Canceled
			}
			return nil
		}}, want)
		if err == nil {
			if n < 50 {
				t.Errorf("done after it was asked %d times", n)
			}
			if err := placed.Release(); err != nil {
				t.Fatal(err)
			}
			break
		}
		if !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
		if left, _ := filepath.Glob(s.path(dirIngest, "*")); len(left) > 0 {
			t.Fatalf("left in staging after %d: %q", n, left)
		}
	}
	leavesNothing(t, s, ids, tars)
}

// A payload that is damaged in a dense pack is not copied: its layers are out of service until it comes in again, and
// the pack goes then. Others are served meanwhile.
func TestDamageInDensePack(t *testing.T) {
	root := t.TempDir()
	ids, tars := denseLayers(t, root, 4)
	s := openQuiet(t, root, Options{}, ids...)
	harmPayload(t, s, smallText(2, 7), "flipped", "")
	for i := range ids {
		placed, err := s.Places(t.Context(), objectsOf(t, s, ids[i]))
		if errors.Is(err, ErrDamaged) != (i == 2) {
			t.Errorf("layer %d: %v", i, err)
		}
		if err == nil {
			err = placed.Release()
		}
		if err != nil && i != 2 {
			t.Error(err)
		}
	}
	expectService(t, s, ids, ids[2:3], tars)
	if err := s.Compact(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := densePacks(t, s); n != 1 {
		t.Errorf("%d packs are dense", n)
	}
	s.Release(ingest(t, s, tars[2]).Layer)
	if n := densePacks(t, s); n != 0 {
		t.Errorf("it is healed, and %d packs are dense", n)
	}
	leavesNothing(t, s, ids, tars)
}

// While a tree is damaged it is not known what is named, so dense packs stay when they have been copied. What the tree
// names is still there when it is put back.
func TestDensePacksStayForDamagedTree(t *testing.T) {
	root := t.TempDir()
	ids, tars := denseLayers(t, root, 3)
	path := filepath.Join(root, dirLayers, ids[1].Hex())
	whole := readFile(t, path)
	writeFile(t, path, whole[:len(whole)/3])
	s := openQuiet(t, root, Options{}, ids...)
	for _, id := range []content.LayerID{ids[0], ids[2]} {
		for range 2 {
			placed, err := s.Places(t.Context(), objectsOf(t, s, id))
			if err != nil {
				t.Fatal(err)
			}
			if err := placed.Release(); err != nil {
				t.Fatal(err)
			}
		}
	}
	if found, err := s.RemoveOrphans(t.Context()); err != nil || len(found) > 0 {
		t.Errorf("removed %+v, %v", found, err)
	}
	if st := s.Packs().Stats(); densePacks(t, s) != 3 || st.Packs > 5 {
		t.Errorf("%+v", st)
	}
	expectService(t, s, ids, ids[1:2], tars)
	writeFile(t, path, whole)
	for _, f := range checkStore(t, s) {
		if f.Kind != Orphan { // what has been copied goes now
			t.Errorf("%+v", f)
		}
	}
	placed, err := s.Places(t.Context(), objectsOf(t, s, ids[1]))
	if err != nil {
		t.Fatal(err)
	}
	if err := placed.Release(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.RemoveOrphans(t.Context()); err != nil {
		t.Error(err)
	}
	closeStore(t, s)
	s = openQuiet(t, root, Options{}, ids...)
	if err := s.Compact(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := densePacks(t, s); n != 0 {
		t.Errorf("%d packs are dense", n)
	}
	leavesNothing(t, s, ids, tars)
}

// A copy that does not fit is refused before any of it is written; one that meets the end of the disk leaves nothing.
// Both say what to do, and come about once there is room.
func TestDensePacksOnFullDisk(t *testing.T) {
	for _, row := range []struct {
		name    string
		reserve Reserve
		leave   int64 // beside what the copy takes
		taken   bool  // somebody else takes all of it when the copy has begun
		want    string
	}{
		{"too little", Reserve{}, -50 << 10, false, "and %s has"},
		{"too little above the reserve", Reserve{Space: Amount{Fixed: 12 << 20}}, 11 << 20, false, "of them in reserve"},
		{"in the middle", Reserve{}, 1 << 20, true, "no space left on device"},
	} {
		t.Run(row.name, func(t *testing.T) {
			root := smallDisk(t, 4096)
			ids, tars := denseLayers(t, root, 3)
			filled := filepath.Join(root, "fill")
			s := openQuiet(t, root, Options{Reserve: row.reserve}, ids...)
			want := objectsOf(t, s, ids[0])
			var takes int64
			for _, id := range want {
				at, _ := s.objects.Place(id)
				takes += content.Blocks(at.Size)
			}
			fillUp(t, filled, takes+row.leave)
			before := s.Used()
			for range 3 {
				asked := 0
				_, err := s.Places(askedCtx{t.Context(), func() error {
					if asked++; asked == 10 && row.taken {
						fillUp(t, filled+"-too", 0)
					}
					return nil
				}}, want)
				if !errors.Is(err, unix.ENOSPC) || !errors.Is(err, object.ErrTooDense) ||
					!strings.Contains(err.Error(), strings.ReplaceAll(row.want, "%s", root)) ||
					!strings.Contains(err.Error(), "the kernel does not mount packs with blocks of 512 bytes") {
					t.Errorf("it fits: %v", err)
				}
				if err := s.Compact(t.Context()); err != nil && !errors.Is(err, unix.ENOSPC) {
					t.Error(err)
				}
				if row.taken {
					emptyAgain(t, filled+"-too")
				}
			}
			if after := s.Used(); after != before {
				t.Errorf("%+v is used after the failure, %+v before", after, before)
			}
			leavesNothing(t, s, ids, tars)
			emptyAgain(t, filled)
			placed, err := s.Places(t.Context(), want)
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(placed.Release(), s.Compact(t.Context())); err != nil {
				t.Error(err)
			}
			if n := densePacks(t, s); n != 0 {
				t.Errorf("%d packs are dense with room again", n)
			}
			leavesNothing(t, s, ids, tars)
		})
	}
}

// fillUp takes all but so many bytes of a disk.
func fillUp(t *testing.T, path string, leave int64) {
	t.Helper()
	fd, err := unix.Open(path, unix.O_CREAT|unix.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	unix.Sync() // what is not yet on the disk has no blocks yet
	st := statfs(t, path)
	size := int64(st.Bavail)*st.Bsize - leave
	if leave == 0 { // root may take what is kept for it
		size = int64(st.Bfree) * st.Bsize
	}
	for ; size > 0; size -= st.Bsize { // a file's own map takes blocks, too
		if err = unix.Fallocate(fd, 0, 0, size); err == nil {
			return
		}
	}
	t.Fatal(err)
}

func emptyAgain(t *testing.T, path string) {
	t.Helper()
	if err := unix.Unlink(path); err != nil {
		t.Fatal(err)
	}
}

// What layers share, what they are said to use and what packs hold add up before, while and after dense packs are
// copied, and blobs are made again from either.
func TestDensePacksAddUp(t *testing.T) {
	root := t.TempDir()
	s := openQuiet(t, root, Options{Dense: true})
	var all []Ingested
	var ids []content.LayerID
	var tars [][]byte
	for i := range 6 {
		tar := makeTar(t, member{name: "own", data: smallText(i, 1)}, member{name: "pair", data: smallText(i/2, 2)},
			member{name: "all", data: smallText(99, 5)}, member{name: "inline", data: "inline"})
		all, tars = append(all, ingest(t, s, tar)), append(tars, tar)
		ids = append(ids, all[i].Layer)
		s.Claim(ids[i], Usage{})
		if err := MakeRecipe(t.Context(), s, diffIDOf(tar), blobOf(tar)); err != nil {
			t.Fatal(err)
		}
	}
	adds := func(dense bool) {
		t.Helper()
		expectSum(t, s, all...)
		if u, err := s.Measure(t.Context()); err != nil || u.Bytes-blocksOf(t, s.path(dirLayers))-
			blocksOf(t, s.path(dirRecipes)) != s.Used().Bytes {
			t.Errorf("%+v on the disk, %+v counted: %v", u, s.Used(), err)
		}
		want := map[string]Usage{}
		for set, objects := range bruteObjects(t, s) {
			var u Usage
			for _, size := range objects {
				u.Bytes += erofs.Space(size, dense)
			}
			want[set] = u
		}
		sharing, err := s.Sharing(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		var sum int64
		for set, u := range collect(sharing) {
			if sum += u.Bytes; u != want[set] {
				t.Errorf("layers %s share %+v, want %+v", set, u, want[set])
			}
		}
		if st := s.Packs().Stats(); st.Live != sum || st.Dead != 0 {
			t.Errorf("layers have %d bytes, and packs %+v", sum, st)
		}
		for _, tar := range tars {
			if err := again(t, s, tar); err != nil {
				t.Error(err)
			}
		}
	}
	adds(true)
	closeStore(t, s)
	s = openQuiet(t, root, Options{}, ids...)
	for _, id := range ids { // as the snapshots' records do at a start
		s.Claim(id, Usage{})
	}
	adds(true)
	if err := s.Compact(t.Context()); err != nil {
		t.Fatal(err)
	}
	adds(false)
}

// bruteObjects are the sizes of objects by the layers that have them.
func bruteObjects(t *testing.T, s *Store) map[string][]int64 {
	t.Helper()
	having, sizes := map[content.ObjectID][]int{}, map[content.ObjectID]int64{}
	for i, l := range s.List() {
		for _, id := range objectsOf(t, s, l.ID) {
			having[id] = append(having[id], i)
			at, _ := s.objects.Place(id)
			sizes[id] = at.Size
		}
	}
	out := map[string][]int64{}
	for id, layers := range having {
		out[fmt.Sprint(layers)] = append(out[fmt.Sprint(layers)], sizes[id])
	}
	return out
}

// What is shared is told once for each object, though its copy takes another size meanwhile.
func TestSharingWhileDensePacksAreCopied(t *testing.T) {
	root := t.TempDir()
	s := openQuiet(t, root, Options{Dense: true})
	var ids []content.LayerID
	for i := range 6 {
		all := member{name: "all", data: smallText(99, 5)}
		ids = append(ids, ingest(t, s, makeTar(t, all, member{name: "own", data: smallText(i, 1)})).Layer)
	}
	closeStore(t, s)
	s = openQuiet(t, root, Options{}, ids...)
	asked := 0
	sharing, err := s.Sharing(askedCtx{t.Context(), func() error {
		if asked++; asked == 4 { // before the tree of the fourth layer
			return s.Compact(t.Context())
		}
		return nil
	}})
	if err != nil || densePacks(t, s) != 0 {
		t.Fatal(err, "nothing was copied")
	}
	for _, set := range sharing.sets {
		if set.bytes < set.objects*erofs.DenseBlock || set.objects == 0 && set.bytes != 0 {
			t.Errorf("%d objects take %d bytes", set.objects, set.bytes)
		}
	}
}
