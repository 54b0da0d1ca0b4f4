package integration

import (
	"bytes"
	"context"
	"crypto/md5"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/registry"
)

// Several clients pull, run, commit and remove at random through containerd, with a daemon under the race detector that
// is restarted and killed, as containerd is. Every container must read what its image holds. At the end of each round
// everything is removed, and nothing may be left; at the end nothing may have grown. DEDUP_LONG=1 does what takes about
// an hour, DEDUP_SOAK_ROUNDS=n as many larger rounds.
func TestSoak(t *testing.T) {
	t.Parallel()
	plan := soakPlan{clients: 4, troubled: 1, calm: 2, ops: 12}
	if os.Getenv("DEDUP_LONG") != "" {
		plan = soakPlan{clients: 6, troubled: 30, calm: 30, ops: 40}
	}
	if text := os.Getenv("DEDUP_SOAK_ROUNDS"); text != "" {
		rounds, err := strconv.Atoi(text)
		must(t, err)
		plan = soakPlan{clients: 6, troubled: rounds / 2, calm: rounds - rounds/2, ops: 40}
	}
	seed := rand.Uint64()
	t.Logf("seed %d, %+v", seed, plan)
	s := newSoak(t, plan, seed)
	for i := range plan.troubled + plan.calm {
		s.round(t, i, i < plan.troubled)
		if t.Failed() {
			t.Fatalf("in round %d", i)
		}
		if i%10 == 9 {
			t.Logf("round %d: %v", i, s.counts())
		}
	}
	s.noGrowth(t)
	log, err := os.ReadFile(s.n.LogPath("dedup"))
	must(t, err)
	for _, bad := range []string{"WARNING: DATA RACE", "panic:", "fatal error:", "level=error"} {
		if at := bytes.Index(log, []byte(bad)); at >= 0 {
			t.Errorf("the daemon says: %s", log[at:min(len(log), at+3000)])
		}
	}
	t.Logf("%v; %d errors while something was restarted; %d restarts and kills", s.counts(), s.excused.Load(), s.restarts)
}

// soakPlan is how much is done. Nothing depends on the clock.
type soakPlan struct {
	clients int
	// troubled rounds have restarts and kills, calm ones come after them, with one daemon.
	troubled, calm int
	ops            int // of each client in each round
}

type soak struct {
	plan    soakPlan
	n       *node.Node
	ctx     context.Context
	client  *client.Client
	metrics string
	images  []soakImage
	seed    uint64
	samples []soakSample

	// trouble is odd while something is restarted, and greater after.
	trouble  atomic.Int64
	restarts int
	excused  atomic.Int64

	mu   sync.Mutex // guards done
	done map[string]int
}

// soakImage is one in a registry; sum is the md5 sum of all that it holds in /soak, as md5sum prints it.
type soakImage struct{ ref, sum string }

func newSoak(t *testing.T, plan soakPlan, seed uint64) *soak {
	t.Helper()
	s := &soak{plan: plan, seed: seed, done: map[string]int{}, metrics: freeAddress(t)}
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(cancel)
	s.ctx = ctx
	s.n = startDedup(t, node.Options{DaemonBinary: raceDaemon(t), Daemon: map[string]any{"metrics_address": s.metrics}})
	c, err := client.New(s.n.Address())
	must(t, err)
	t.Cleanup(func() { _ = c.Close() })
	s.client = c
	s.images = soakImages(t, rand.New(rand.NewPCG(seed, 1)))
	return s
}

// raceDaemon builds the daemon with the race detector, where there is a C compiler.
func raceDaemon(t *testing.T) string {
	t.Helper()
	if _, err := exec.LookPath("gcc"); err != nil {
		t.Log("no gcc: the daemon runs without the race detector")
		return ""
	}
	root, err := node.ModuleRoot()
	must(t, err)
	path := filepath.Join(t.TempDir(), "containerd-dedup-grpc")
	cmd := exec.CommandContext(testContext(t), "go", "build", "-race", "-o", path, "./cmd/containerd-dedup-grpc")
	cmd.Dir, cmd.Env = root, append(os.Environ(), "CGO_ENABLED=1", "GOFLAGS=-buildvcs=false")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build with -race: %v\n%s", err, out)
	}
	return path
}

// soakLayer is one layer in two compressions.
type soakLayer struct {
	entries []image.Entry
	forms   []*image.Layer
}

func newSoakLayer(t *testing.T, r *rand.Rand, i int) (l soakLayer) {
	t.Helper()
	l.entries = []image.Entry{image.Dir("soak")}
	for f := range 25 {
		e := payload("soak", fmt.Sprintf("soak/%d-%d", i, f), 2+r.IntN(60_000))
		if f%3 == 0 { // the same bytes in many layers
			e.Content = payload("soak", fmt.Sprint("many", f), 20_000).Content
		}
		l.entries = append(l.entries, e)
	}
	for _, c := range []image.Compression{image.Gzip, image.Zstd} {
		form, err := image.FromEntries(t.TempDir(), image.LayerOptions{Compression: c}, l.entries...)
		must(t, err)
		l.forms = append(l.forms, form)
	}
	return l
}

// soakImages push images that share layers and files, in two registries, some of them compressed twice.
func soakImages(t *testing.T, r *rand.Rand) (all []soakImage) {
	t.Helper()
	var shared []soakLayer
	for i := range 7 {
		shared = append(shared, newSoakLayer(t, r, i))
	}
	base := busybox(t)
	registries := []*registry.Registry{startRegistry(t), startRegistry(t)}
	for i := range 10 {
		own := payload("soak", fmt.Sprintf("soak/own-%d", i), 5000)
		layers, entries := []*image.Layer{base}, []image.Entry{own}
		for _, at := range r.Perm(len(shared))[:1+r.IntN(4)] {
			layers = append(layers, shared[at].forms[r.IntN(2)])
			entries = append(entries, shared[at].entries[1:]...)
		}
		layers = append(layers, layer(t, own))
		slices.SortFunc(entries, func(a, b image.Entry) int { return strings.Compare(a.Name, b.Name) })
		h := md5.New()
		for _, e := range entries {
			h.Write([]byte(e.Content))
		}
		all = append(all, soakImage{push(t, registries[i%2], fmt.Sprintf("soak:%d", i), layers...),
			fmt.Sprintf("%x  -\n", h.Sum(nil))})
	}
	return all
}

// readAll prints the sum that a soakImage has.
const readAll = "cat $(ls -d /soak/* | LC_ALL=C sort) | md5sum"

// count counts what was done.
func (s *soak) count(what string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.done[what]++
}

func (s *soak) counts() map[string]int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.done
}

// round lets all clients work, with restarts meanwhile if it is troubled, and removes everything.
func (s *soak) round(t *testing.T, i int, troubled bool) {
	t.Helper()
	var wg sync.WaitGroup
	stop := make(chan struct{})
	for k := range s.plan.clients {
		c := &soakClient{s: s, ns: fmt.Sprint("soak-", k), r: rand.New(rand.NewPCG(s.seed, uint64(100*i+k+10)))}
		wg.Go(func() {
			for done, tries := 0, 0; done < s.plan.ops && tries < 10*s.plan.ops; tries++ {
				ok, err := c.op()
				if err != nil {
					t.Errorf("client %d: %v", k, err)
					return
				}
				if ok {
					done++
				}
			}
		})
	}
	troubles := make(chan error, 1)
	go func() { troubles <- s.makeTrouble(stop, troubled, rand.New(rand.NewPCG(s.seed, uint64(i)))) }()
	wg.Wait()
	close(stop)
	must(t, <-troubles)
	if r := fsck(t, s.n, 0); r.Damaged > 0 {
		t.Errorf("fsck: %+v", r.Findings)
	}
	for k := range s.plan.clients {
		must(t, s.removeAll(namespaces.WithNamespace(s.ctx, fmt.Sprint("soak-", k))))
	}
	s.nothingLeft(t)
	if !troubled {
		s.samples = append(s.samples, s.sample(t))
	}
}

// makeTrouble stops, kills and starts the daemon and containerd until stop is closed, and at most as often as a client
// has things to do.
func (s *soak) makeTrouble(stop chan struct{}, troubled bool, r *rand.Rand) error {
	for i := 0; troubled && i < s.plan.ops; i++ {
		select {
		case <-stop:
			return nil
		case <-time.After(time.Duration(100+r.IntN(1400)) * time.Millisecond):
		}
		s.trouble.Add(1)
		daemon, containerd := s.n.StopDaemon, s.n.StopContainerd
		if r.IntN(2) == 0 {
			daemon, containerd = s.n.KillDaemon, s.n.KillContainerd
		}
		ends, starts := daemon, s.n.StartDaemon
		if r.IntN(3) == 0 {
			ends, starts = containerd, s.n.StartContainerd
		}
		if err := errors.Join(ends(), starts(s.ctx)); err != nil {
			return err
		}
		s.restarts++
		s.trouble.Add(1)
	}
	return nil
}

// soakClient works in a containerd namespace of its own.
type soakClient struct {
	s  *soak
	ns string
	r  *rand.Rand
	// have are images whose pull was acknowledged, and whose removal was not asked for: they run, whatever was killed.
	have []soakImage
}

// errWrongBytes is never excused.
var errWrongBytes = errors.New("wrong bytes")

// op does one thing. What fails while something is restarted may fail; then ok is false.
func (c *soakClient) op() (ok bool, err error) {
	ctx := namespaces.WithNamespace(c.s.ctx, c.ns)
	before := c.s.trouble.Load()
	what, err := c.pick(ctx)
	if err == nil {
		c.s.count(what)
		return true, nil
	}
	if after := c.s.trouble.Load(); errors.Is(err, errWrongBytes) || after == before && before%2 == 0 {
		return false, fmt.Errorf("%s: %w", what, err)
	}
	c.s.excused.Add(1)
	for c.s.trouble.Load()%2 == 1 {
		time.Sleep(10 * time.Millisecond)
	}
	return false, nil
}

func (c *soakClient) pick(ctx context.Context) (what string, err error) {
	n := c.r.IntN(12)
	switch {
	case len(c.have) < 2 || n < 4:
		return "pulls", c.pull(ctx)
	case n < 7:
		return "runs", c.run(ctx, c.any())
	case n < 9:
		return "commits", c.commit(ctx, c.any())
	case n < 10:
		return "garbage collections", c.s.collect(ctx)
	}
	at := c.r.IntN(len(c.have))
	img := c.have[at]
	c.have = slices.Delete(c.have, at, at+1)
	return "removals", c.remove(ctx, img)
}

// parentGone is what containerd's metadata store says; ours has other words.
var parentGone = regexp.MustCompile(`parent snapshot sha256:[0-9a-f]{64} does not exist`)

func (c *soakClient) any() soakImage { return c.have[c.r.IntN(len(c.have))] }

func (c *soakClient) pull(ctx context.Context) error {
	img := c.s.images[c.r.IntN(len(c.s.images))]
	pull, tries := c.s.n.Pull, 1
	if c.r.IntN(4) == 0 {
		// containerd's own race, with any snapshotter: a client that unpacks by itself looks for the parent, and does not
		// hold it; the garbage collection after an earlier removal may take it away before the next layer is prepared.
		pull, tries = c.s.n.PullLocal, 3
	}
	err := pull(ctx, node.Snapshotter, img.ref)
	for ; tries > 1 && err != nil && parentGone.MatchString(err.Error()); tries-- {
		c.s.count("parents gone under a client that unpacks")
		err = pull(ctx, node.Snapshotter, img.ref)
	}
	if err != nil {
		return err
	}
	if !slices.Contains(c.have, img) {
		c.have = append(c.have, img)
	}
	return nil
}

// run reads all in a container, which tells by its exit status what it found: ctr loses the output of one that ends
// before ctr has come to reading it.
func (c *soakClient) run(ctx context.Context, img soakImage) error {
	const wrong = 33
	check := fmt.Sprintf(`[ "$(%s)" = "%s" ] || exit %d`, readAll, strings.TrimSpace(img.sum), wrong)
	_, err := c.s.n.Run(ctx, node.Snapshotter, img.ref, "sh", "-c", check)
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && exit.ExitCode() == wrong {
		return fmt.Errorf("a container of %s: %w", img.ref, errWrongBytes)
	}
	return err
}

func (c *soakClient) remove(ctx context.Context, img soakImage) error {
	args := []string{"image", "rm", img.ref}
	if c.r.IntN(2) == 0 {
		args = []string{"image", "rm", "--sync", img.ref}
	}
	_, err := c.s.n.Ctr(ctx, args...)
	return err
}

// commit makes a snapshot of what a container wrote, and reads it back.
func (c *soakClient) commit(ctx context.Context, img soakImage) (err error) {
	id := node.NewID("soak")
	made := payload(id, "made", 30_000).Content[:1000]
	args := []string{"run", "--snapshotter", node.Snapshotter, "--runc-root", filepath.Join(c.s.n.Dir(), "runc"),
		img.ref, id, "sh", "-c", "rm /soak/own-*; for i in 1 2 3 4 5; do echo " + made + "; done > /made"}
	if _, err := c.s.n.Ctr(ctx, args...); err != nil {
		return err
	}
	sn, name := c.s.client.SnapshotService(node.Snapshotter), "committed-"+id
	keep := snapshots.WithLabels(map[string]string{"containerd.io/gc.root": time.Now().Format(time.RFC3339)})
	if err := sn.Commit(ctx, name, id, keep); err != nil {
		return err
	}
	if _, err := c.s.n.Ctr(ctx, "container", "rm", "--keep-snapshot", id); err != nil {
		return err
	}
	mounts, err := sn.View(ctx, "view-"+id, name, keep)
	if err != nil {
		return err
	}
	err = c.s.n.WithMounts(mounts, func(root string) error { return holdsCommitted(root, made) })
	return errors.Join(err, sn.Remove(ctx, "view-"+id), sn.Remove(ctx, name))
}

func holdsCommitted(root, made string) error {
	got, err := os.ReadFile(filepath.Join(root, "made"))
	if err == nil && string(got) != strings.Repeat(made+"\n", 5) {
		err = fmt.Errorf("the committed file has %d bytes: %w", len(got), errWrongBytes)
	}
	if own, _ := filepath.Glob(filepath.Join(root, "soak/own-*")); len(own) > 0 {
		err = errors.Join(err, fmt.Errorf("%v are there, and were removed: %w", own, errWrongBytes))
	}
	return err
}

// removeAll empties a namespace of all that a client made, also of what an error left.
func (s *soak) removeAll(ctx context.Context) error {
	var errs []error
	all, err := s.client.Containers(ctx)
	errs = append(errs, err)
	for _, c := range all {
		if task, err := c.Task(ctx, nil); err == nil {
			_, err = task.Delete(ctx, client.WithProcessKill)
			errs = append(errs, ignoreNotFound(err))
		}
		errs = append(errs, ignoreNotFound(c.Delete(ctx, client.WithSnapshotCleanup)))
	}
	held, err := s.client.LeasesService().List(ctx)
	errs = append(errs, err)
	for _, l := range held {
		errs = append(errs, ignoreNotFound(s.client.LeasesService().Delete(ctx, l)))
	}
	list, err := s.client.ImageService().List(ctx)
	errs = append(errs, err)
	for _, img := range list {
		errs = append(errs, ignoreNotFound(s.client.ImageService().Delete(ctx, img.Name)))
	}
	sn := s.client.SnapshotService(node.Snapshotter)
	for range 10 { // children before parents
		errs = append(errs, sn.Walk(ctx, func(ctx context.Context, info snapshots.Info) error {
			if info.Labels["containerd.io/gc.root"] != "" {
				_ = sn.Remove(ctx, info.Name)
			}
			return nil
		}))
	}
	return errors.Join(append(errs, s.collect(ctx))...)
}

// collect collects garbage: a lease that goes does so.
func (s *soak) collect(ctx context.Context) error {
	lease, err := s.client.LeasesService().Create(ctx, leases.WithRandomID())
	if err != nil {
		return err
	}
	return s.client.LeasesService().Delete(ctx, lease, leases.SynchronousDelete)
}

func ignoreNotFound(err error) error {
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}
