package integration

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/images/archive"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"golang.org/x/sync/errgroup"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/registry"
)

// dropper is one client of a node that drops blobs, with an image of its own over a base that all share.
type dropper struct {
	n         *node.Node
	r, other  *registry.Registry
	ref, dir  string
	own       *image.Layer
	rand      *rand.Rand
	pulled    bool
	completed bool
	exports   int
	fetches   int // how often the registry may have been asked for own so far
}

// step does one thing that succeeds where blobs are kept.
func (d *dropper) step(t *testing.T) error {
	ctx := testContext(t)
	if !d.pulled {
		d.pulled, d.completed = true, false
		d.fetches++
		return d.n.Pull(ctx, node.Snapshotter, d.ref)
	}
	switch d.rand.IntN(8) {
	case 0:
		d.pulled = false
		_, err := d.n.Ctr(ctx, "image", "rm", "--sync", d.ref)
		return err
	case 1:
		_, err := dedupctl(t, d.n, "trim", "--wait", "0s") // everybody's
		return err
	case 2:
		d.completed = false
		_, err := dedupctl(t, d.n, "trim", "--wait", "0s", "--fetched", d.ref)
		return err
	case 3:
		return d.export(t)
	case 4:
		if err := d.complete(t); err != nil {
			return err
		}
		d.exports++
		to := d.other.Ref(fmt.Sprint("pushed/", filepath.Base(d.dir), ":", d.exports))
		_, err := d.n.Ctr(ctx, "image", "push", "--plain-http", to, d.ref)
		return err
	case 5:
		return d.n.Pull(ctx, node.Snapshotter, d.ref)
	case 6: // what nobody else has
		if err := d.export(t); err != nil {
			return err
		}
		return d.n.Import(ctx, node.Snapshotter, filepath.Join(d.dir, fmt.Sprint(d.exports, ".tar")))
	}
	out, err := d.n.Run(ctx, node.Snapshotter, d.ref, "/bin/cat", "/own")
	if err == nil && !strings.Contains(out, d.ref) {
		again, aerr := d.n.Run(ctx, node.Snapshotter, d.ref, "/bin/sh", "-c", "ls -l /own; cat /own")
		err = fmt.Errorf("the container shows %q, and one more %q, %v", out, again, aerr)
	}
	return err
}

func (d *dropper) complete(t *testing.T) error {
	if !d.completed {
		d.completed = true
		d.fetches++
	}
	if out, err := dedupctl(t, d.n, completeArgs(d.n, d.ref)...); err != nil {
		return fmt.Errorf("complete: %w: %s", err, out)
	}
	return nil
}

func (d *dropper) export(t *testing.T) error {
	if err := d.complete(t); err != nil {
		return err
	}
	d.exports++
	return export(testContext(t), d.n, d.ref, filepath.Join(d.dir, fmt.Sprint(d.exports, ".tar")))
}

// check finds what was fetched although it was there.
func (d *dropper) check() error {
	all, err := d.r.Fetched()
	if err != nil {
		return err
	}
	fetched := 0
	for _, h := range all {
		if h == d.own.Hash {
			fetched++
		}
	}
	if fetched > d.fetches {
		return fmt.Errorf("its layer was fetched %d times, and wanted %d times", fetched, d.fetches)
	}
	return nil
}

// committer is a client that fetches missing blobs by itself: nerdctl runs, commits, saves, tags and pushes.
type committer struct {
	n         *node.Node
	ctl       *node.Nerdctl
	other     *registry.Registry
	ref, dir  string
	rand      *rand.Rand
	pulled    bool
	committed int
}

func (c *committer) step(t *testing.T) error {
	do := func(commands ...string) error {
		for _, command := range commands {
			if _, err := c.ctl.Run(testContext(t), strings.Fields(command)...); err != nil {
				return err
			}
		}
		return nil
	}
	if !c.pulled {
		c.pulled = true
		return do("pull --quiet " + c.ref)
	}
	c.committed++
	target := c.other.Ref(fmt.Sprint("committed:", c.committed))
	switch c.rand.IntN(5) {
	case 0:
		c.pulled = false
		return do("rmi --force " + c.ref)
	case 1:
		box := fmt.Sprint("box", c.committed)
		return do("run --name "+box+" --net none "+c.ref+" /bin/touch /new", "commit "+box+" "+target,
			"push --quiet "+target, "rm --force "+box, "run --rm --net none "+target+" /bin/cat /new /own")
	case 2:
		return do("save --output " + filepath.Join(c.dir, "saved.tar") + " " + c.ref)
	case 3:
		return do("tag "+c.ref+" "+target, "push --quiet "+target, "rmi "+target)
	}
	_, err := dedupctl(t, c.n, "trim", "--wait", "0s", "--namespace", c.ctl.Namespace())
	return err
}

// Several clients pull, run, remove, trim, complete, export, import, push, commit and save side by side, while the
// daemon drops blobs by itself: nothing fails, and nothing is fetched that is there. In the end no blob of a layer is
// left, and every image runs. DEDUP_LONG does it for longer, beside BuildKit.
func TestDrop(t *testing.T) {
	t.Parallel()
	clients, steps := 3, 8
	if os.Getenv("DEDUP_LONG") != "" {
		clients, steps = 6, 150
	}
	n := startDedup(t, node.Options{Daemon: map[string]any{"blobs": "drop"}})
	r, other := startRegistry(t), startRegistry(t)
	base, seed := busybox(t), rand.Uint64()
	t.Log("seed", seed)
	var all []*dropper
	var eg errgroup.Group
	for i := range clients {
		name := fmt.Sprint("drop", i)
		d := &dropper{n: n, r: r, other: other, dir: filepath.Join(t.TempDir(), name),
			rand: rand.New(rand.NewPCG(seed, uint64(i)))}
		must(t, os.Mkdir(d.dir, 0o755))
		// The file names its image, which is known once it is pushed: the registry's address comes first.
		d.own = layer(t, payload(name, "data", 90000), image.File("own", r.Ref(name+":1")))
		d.ref = push(t, r, name+":1", base, d.own)
		all = append(all, d)
		eg.Go(func() error {
			for range steps {
				if err := cmp.Or(d.step(t), d.check()); err != nil {
					return fmt.Errorf("%s: %w", d.ref, err)
				}
			}
			return nil
		})
	}
	ctl, err := node.NewNerdctl(testContext(t), n, node.Snapshotter, nil)
	must(t, err)
	c := &committer{n: n, ctl: ctl, other: other, dir: t.TempDir(), rand: rand.New(rand.NewPCG(seed, 99)),
		ref: push(t, r, "nerdctl:1", base, layer(t, payload("nerdctl", "data", 90000), image.File("own", "nerdctl")))}
	eg.Go(func() error {
		for range steps {
			if err := c.step(t); err != nil {
				return fmt.Errorf("nerdctl: %w", err)
			}
		}
		return nil
	})
	if os.Getenv("DEDUP_LONG") != "" {
		b := startBuildKit(t, n, node.Snapshotter)
		eg.Go(func() error { return builds(t, b, other, all[0].ref, steps/5) })
	}
	must(t, eg.Wait())
	fsck(t, n, 0)
	dropsInTheEnd(t, n, r, all, ctl.Namespace())
}

// builds has BuildKit build and push over an image, again and again.
func builds(t *testing.T, b *node.BuildKit, to *registry.Registry, base string, times int) error {
	for i := range times {
		dir := contextDir(t, map[string]string{"file": fmt.Sprint("build ", i), "Dockerfile": "FROM " + base +
			"\nCOPY file /\nRUN cat /file /own > /both\n"})
		out := "type=image,push=true,name=" + to.Ref(fmt.Sprint("built:", i))
		if progress, err := b.Build(testContext(t), dir, "--output", out); err != nil {
			return fmt.Errorf("build: %w: %s", err, progress)
		}
	}
	return nil
}

// dropsInTheEnd looks that blobs go once nobody works with the node any more, and that the images run.
func dropsInTheEnd(t *testing.T, n *node.Node, r *registry.Registry, all []*dropper, others string) {
	t.Helper()
	for _, d := range all {
		if d.pulled {
			_, err := n.Ctr(testContext(t), "image", "rm", "--sync", d.ref)
			must(t, err)
		}
		pull(t, n, node.Snapshotter, d.ref)
	}
	// On a base of its own: what shares one with an export stays for ten minutes more.
	last := layer(t, payload("drop", "last", 90000))
	pull(t, n, node.Snapshotter, push(t, r, "last:1", last))
	eventually(t, "the blobs of a pull to go", func() bool { return !has(t, n, node.Namespace, last)[0] })
	for _, d := range all {
		out, err := n.Run(testContext(t), node.Snapshotter, d.ref, "/bin/cat", "/own")
		if err != nil || !strings.Contains(out, d.ref) {
			t.Errorf("%s: %q, %v", d.ref, out, err)
		}
	}
	trim(t, n, "--fetched", "--namespace", node.Namespace)
	for _, d := range all {
		wantBlobs(t, "of "+d.ref, has(t, n, node.Namespace, d.own), false)
	}
	fsck(t, n, 0)
}

// An export that a client reads piece by piece, with nothing open in between, has all blobs to its end, whoever trims
// meanwhile. Then they go.
func TestTrimLeavesReaders(t *testing.T) {
	t.Parallel()
	n, r := startDedup(t, node.Options{}), startRegistry(t)
	layers := []*image.Layer{layer(t, payload("readers", "base", 3000000)), layer(t, payload("readers", "app", 3000000))}
	ref := push(t, r, "app:1", layers...)
	pull(t, n, node.Snapshotter, ref)
	ctx := namespaces.WithNamespace(testContext(t), node.Namespace)
	trims := 0
	err := n.Client().Export(ctx, writerFunc(func(p []byte) (int, error) {
		if len(p) > 4096 { // of a layer
			trims++
			if trims == 1 || trims == 40 { // in either
				asked := time.Now()
				v := trim(t, n, "--wait", "0s", "--fetched")
				if late := time.Since(asked) > 10*time.Second; late { // a reader counts for 15 seconds
					t.Skip("this machine is too busy: the trim took as long as a reader counts")
				}
				if v.FreedBlobs != 0 || !strings.Contains(v.kept(ref), "being read") {
					t.Errorf("while it is exported: %+v", v)
				}
			}
		}
		return len(p), nil
	}), archive.WithImage(n.Client().ImageService(), ref))
	must(t, err)
	if trims < 40 {
		t.Errorf("%d writes of layers", trims)
	}
	wantBlobs(t, "exported", has(t, n, node.Namespace, layers...), true)
	if v := trim(t, n); v.FreedBlobs != 2 {
		t.Errorf("after the export: %+v", v)
	}
	fsck(t, n, 0)
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// A blob is gone only when its layer is whole on the disk, whenever the daemon is killed.
func TestTrimKilled(t *testing.T) {
	t.Parallel()
	n, r := startDedup(t, node.Options{}), startRegistry(t)
	base := busybox(t)
	var refs []string
	for i := range 5 {
		name := fmt.Sprint("killed", i)
		own := layer(t, payload(name, "data", 90000), image.File("own", name))
		refs = append(refs, push(t, r, name+":1", base, own))
		pulled := make(chan error, 1)
		go func() { pulled <- n.Pull(testContext(t), node.Snapshotter, refs[i]) }()
		if i%2 == 0 { // else the kill comes while it is pulled, too
			must(t, <-pulled)
			pulled <- nil
		}
		trimmed := make(chan bool)
		go func() {
			defer close(trimmed)
			_, _ = dedupctl(t, n, "trim")
		}()
		time.Sleep(time.Duration(i*15) * time.Millisecond)
		must(t, n.KillDaemon())
		<-trimmed
		must(t, n.StartDaemon(testContext(t)))
		if err := <-pulled; err != nil {
			pull(t, n, node.Snapshotter, refs[i])
		}
		fsck(t, n, 0)
	}
	trim(t, n, "--fetched")
	if left := layerFiles(t, n); left != 0 {
		t.Errorf("%d blobs of layers are left", left)
	}
	for i, ref := range slices.Backward(refs) {
		out, err := n.Run(testContext(t), node.Snapshotter, ref, "/bin/cat", "/own")
		if err != nil || !strings.Contains(out, fmt.Sprint("killed", i)) {
			t.Errorf("%s: %q, %v", ref, out, err)
		}
	}
}
