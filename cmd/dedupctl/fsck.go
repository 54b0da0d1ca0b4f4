package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/urfave/cli/v2"

	dedupv1 "github.com/dedup-snapshotter/dedup-snapshotter/proto/dedup/v1"
)

// errDamage tells the exit code.
var errDamage = errors.New("there is damage")

// Finding is what `fsck --json` and `gc --json` print for each thing; control.proto has what the fields mean.
type Finding struct {
	Kind      string       `json:"kind"`
	Path      string       `json:"path"`
	Problem   string       `json:"problem"`
	Damaged   bool         `json:"damaged"`
	Fixed     bool         `json:"fixed"`
	Hint      string       `json:"hint,omitempty"`
	Bytes     int64        `json:"bytes"`
	Snapshots []string     `json:"snapshots,omitempty"`
	Images    []ImageNames `json:"images,omitempty"`
}

// ImageNames are all names of one image in a namespace.
type ImageNames struct {
	Namespace string   `json:"namespace"`
	Names     []string `json:"names"`
}

// FsckReport is what `fsck --json` prints.
type FsckReport struct {
	// Offline: the daemon does not run. The store was read without it.
	Offline  bool      `json:"offline,omitempty"`
	Findings []Finding `json:"findings"`
	// Damaged and Unused are how many of them still are.
	Damaged int `json:"damaged"`
	Unused  int `json:"unused"`
	Fixed   int `json:"fixed"`
	// Fetched blobs, for a repair.
	Fetched []CompletedBlob `json:"fetched,omitempty"`
	// Problems in words, of a repair that could not fetch something.
	Problems []string `json:"problems,omitempty"`
}

func fsckCommand() *cli.Command {
	return &cli.Command{
		Name:  "fsck",
		Usage: "verify everything that is stored, and repair it",
		Description: "Reads every object, tree and chain image from the disk and compares it with what its name says.\n" +
			"Tells what is damaged, which images that harms, and what nothing uses. Pulls and containers go on meanwhile.\n" +
			"A damaged layer is out of service until it is whole again.\n" +
			"--repair takes what is damaged from the blobs in containerd's content store, or fetches them again from the\n" +
			"registry that the image came from. It also removes what nothing uses.\n" +
			"While the daemon does not run, fsck without --repair reads the store itself and changes nothing.\n" +
			"Exit codes: 0 nothing is damaged (any more), 1 it did not work, 2 the command line is wrong, 3 there is damage.",
		Flags: append(registryFlags(),
			&cli.BoolFlag{Name: "repair", Usage: "heal what is damaged, remove what nothing uses"},
			&cli.BoolFlag{Name: "no-fetch", Usage: "repair from what this node has alone"},
			configFlag(),
		),
		Action: runFsck,
	}
}

func runFsck(c *cli.Context) error {
	repair := c.Bool("repair")
	var r FsckReport
	var err error
	down := daemonDown(c)
	switch {
	case down != nil && repair:
		return fmt.Errorf("--repair needs the daemon (fsck alone does not): %w", down)
	case down != nil:
		r.Offline = true
		r.Findings, err = offlineCheck(c)
	default:
		r.Findings, err = check(c, &dedupv1.CheckRequest{Repair: repair})
	}
	if err != nil {
		return err
	}
	if repair && !c.Bool("no-fetch") && r.fetchable() {
		r.fetch(c)
		known, err := check(c, &dedupv1.CheckRequest{Repair: true, KnownOnly: true})
		if err != nil {
			return err
		}
		r.update(known)
	}
	r.count()
	if err := print(c, r, writeFsck); err != nil {
		return err
	}
	if r.Damaged > 0 {
		return fmt.Errorf("%w: %s", errDamage, plural(int64(r.Damaged), "finding", "findings"))
	}
	return nil
}

// check runs one check in the daemon, and shows how far it is.
func check(c *cli.Context, req *dedupv1.CheckRequest) ([]Finding, error) {
	var line progressLine
	stop := showProgress(c, line.String)
	defer stop()
	return ask(c, func(ctx context.Context, client dedupv1.ControlClient) (found []Finding, err error) {
		stream, err := client.Check(ctx, req)
		if err != nil {
			return nil, err
		}
		found = []Finding{}
		for {
			m, err := stream.Recv()
			if errors.Is(err, io.EOF) {
				return found, nil
			}
			if err != nil {
				return nil, err
			}
			if p := m.GetProgress(); p != nil {
				line.set(p)
			}
			if f := m.GetFinding(); f != nil {
				found = append(found, findingOf(f))
			}
		}
	})
}

func findingOf(f *dedupv1.Finding) Finding {
	out := Finding{
		Kind: f.GetKind(), Path: f.GetPath(), Problem: f.GetProblem(), Damaged: f.GetDamaged(), Fixed: f.GetFixed(),
		Hint: f.GetHint(), Bytes: f.GetBytes(), Snapshots: f.GetSnapshots(),
	}
	for _, i := range f.GetImages() {
		out.Images = append(out.Images, ImageNames{i.GetNamespace(), append([]string{}, i.GetNames()...)})
	}
	return out
}

// progressLine says how far a check is, with an estimate of what is left.
type progressLine struct {
	mu    sync.Mutex
	p     *dedupv1.CheckProgress
	since time.Time // that its stage runs
}

func (l *progressLine) set(p *dedupv1.CheckProgress) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.p == nil || l.p.GetStage() != p.GetStage() {
		l.since = time.Now()
	}
	l.p = p
}

func (l *progressLine) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.p == nil {
		return "verifying"
	}
	done, total := l.p.GetDone(), l.p.GetTotal()
	amount := size(done) + " of " + size(total)
	if l.p.GetStage() != "layers" {
		amount = count(done) + " of " + count(total)
	}
	text := fmt.Sprintf("verifying %s: %s (%s)", l.p.GetStage(), amount, percent(done, total))
	if took := time.Since(l.since); done > 0 && took > time.Second {
		left := time.Duration(float64(took) * float64(total-done) / float64(done))
		text += ", about " + left.Round(time.Second).String() + " left"
	}
	return text
}

// fetchable tells whether some damage concerns images, whose blobs a registry may have.
func (r *FsckReport) fetchable() bool {
	return slices.ContainsFunc(r.Findings, func(f Finding) bool { return f.Damaged && !f.Fixed && len(f.Images) > 0 })
}

// fetch fetches the blobs of damaged images that the node lacks or has damaged. What does not work for one image may
// for another that shares the layer.
func (r *FsckReport) fetch(c *cli.Context) {
	ctd, err := dialContainerd(c.Context, c.String("containerd-address"))
	if err != nil {
		r.Problems = append(r.Problems, err.Error())
		return
	}
	defer ctd.Close()
	seen := map[string]bool{}
	// With blobs = "drop" an image lacks all of them: those of layers that are whole are not needed here.
	chains := map[string]bool{}
	for _, f := range r.Findings {
		for _, name := range f.Snapshots {
			chains[name[strings.LastIndexByte(name, '/')+1:]] = true
		}
	}
	for _, f := range r.Findings {
		if !f.Damaged || f.Fixed {
			continue
		}
		for _, img := range f.Images {
			key := img.Namespace + " " + strings.Join(img.Names, " ")
			if len(img.Names) == 0 || seen[key] {
				continue
			}
			seen[key] = true
			ctx := namespaces.WithNamespace(c.Context, img.Namespace)
			done, err := fetchMissing(ctx, c, ctd, nameOf(img.Names), fetchOptions{verify: true, chains: chains})
			r.Fetched = append(r.Fetched, done.Fetched...)
			if err != nil {
				r.Problems = append(r.Problems, err.Error())
			}
		}
	}
}

// nameOf picks the name that a registry knows.
func nameOf(names []string) string {
	for _, n := range names {
		if !strings.HasPrefix(n, "sha256:") {
			return n
		}
	}
	return names[0]
}

// update notes what a second repair has healed.
func (r *FsckReport) update(known []Finding) {
	still := map[string]Finding{}
	for _, f := range known {
		still[f.Path] = f
	}
	for i, f := range r.Findings {
		if f.Kind != "object" && f.Kind != "tree" || f.Fixed {
			continue
		}
		now, listed := still[f.Path]
		if r.Findings[i].Fixed = !listed || now.Fixed; r.Findings[i].Fixed {
			r.Findings[i].Hint = ""
		}
	}
}

func (r *FsckReport) count() {
	for _, f := range r.Findings {
		switch {
		case f.Fixed:
			r.Fixed++
		case f.Damaged:
			r.Damaged++
		default:
			r.Unused++
		}
	}
}

// maxRows is how many findings of one kind a person is shown.
const maxRows = 20

func writeFsck(w io.Writer, r FsckReport) {
	if len(r.Findings) == 0 {
		fmt.Fprintln(w, "nothing damaged, nothing unused")
		return
	}
	writeFindings(w, r.Findings)
	fmt.Fprintf(w, "\n%s damaged, %s unused, %s repaired or removed\n", count(int64(r.Damaged)), count(int64(r.Unused)),
		count(int64(r.Fixed)))
	if len(r.Fetched) > 0 {
		fmt.Fprintf(w, "%s fetched again\n", plural(int64(len(r.Fetched)), "blob", "blobs"))
	}
	for _, p := range r.Problems {
		fmt.Fprintln(w, "could not fetch: "+p)
	}
}

func writeFindings(w io.Writer, found []Finding) {
	shown := map[string]int{}
	images := map[string]bool{}
	hints := map[string]bool{}
	table(w, func(w io.Writer) {
		fmt.Fprintln(w, "KIND\tSTATE\tSIZE\tWHAT\tPROBLEM")
		for _, f := range found {
			if shown[f.Kind]++; shown[f.Kind] <= maxRows {
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", f.Kind, f.state(), dash(f.Bytes), plain(f.Path), plain(f.Problem))
			}
			if f.Fixed {
				continue
			}
			if f.Hint != "" {
				hints[f.Hint] = true
			}
			for _, i := range f.Images {
				images[i.Namespace+"  "+imageName(i.Names)] = true
			}
		}
	})
	for kind, n := range shown {
		if n > maxRows {
			fmt.Fprintf(w, "... and %s of kind %s (--json has all)\n", count(int64(n-maxRows)), kind)
		}
	}
	list := func(title string, set map[string]bool) {
		if len(set) == 0 {
			return
		}
		fmt.Fprintln(w, "\n"+title)
		lines := make([]string, 0, len(set))
		for line := range set {
			lines = append(lines, line)
		}
		slices.Sort(lines)
		for _, line := range lines {
			fmt.Fprintln(w, "  "+line)
		}
	}
	list("harmed images:", images)
	list("what to do:", hints)
}

func (f Finding) state() string {
	switch {
	case f.Fixed && f.Damaged:
		return "repaired"
	case f.Fixed:
		return "removed"
	case f.Damaged:
		return "damaged"
	}
	return "unused"
}

func dash(bytes int64) string {
	if bytes == 0 {
		return "-"
	}
	return size(bytes)
}
