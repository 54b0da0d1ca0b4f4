package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/urfave/cli/v2"
)

func migrateCommand() *cli.Command {
	return &cli.Command{
		Name:      "migrate",
		Usage:     "bring images that another snapshotter has unpacked into dedup, without pulling them",
		ArgsUsage: "[IMAGE...]",
		Description: "Unpacks with dedup every image of the namespace that the other snapshotter has unpacked, or only\n" +
			"those named, from the blobs in containerd's content store. Existing containers stay with the\n" +
			"other snapshotter until you recreate them. --remove-old then removes its snapshots of these images that no\n" +
			"container uses.\n" +
			"--undo goes back: it unpacks with the other snapshotter and frees what dedup holds.\n" +
			"Exit code 1 also when an image could not be migrated, after all others were; the output names it.",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "containerd-address", Usage: "containerd's unix `SOCKET`", Value: defaultContainerd},
			&cli.StringFlag{Name: "namespace", Aliases: []string{"n"}, Usage: "containerd `NAMESPACE` of the images",
				Value: "default", EnvVars: []string{"CONTAINERD_NAMESPACE"}},
			&cli.BoolFlag{Name: "all-namespaces", Aliases: []string{"A"}, Usage: "the images of all namespaces"},
			&cli.StringFlag{Name: "from", Usage: "the other `SNAPSHOTTER`", Value: "overlayfs"},
			&cli.StringFlag{Name: "to", Usage: "the name of dedup as a `SNAPSHOTTER` of containerd", Value: "dedup"},
			&cli.BoolFlag{Name: "remove-old",
				Usage: "remove the other snapshotter's snapshots that no container uses, once dedup's are checked"},
			&cli.BoolFlag{Name: "undo", Usage: "go back from dedup to the other snapshotter"},
			&cli.BoolFlag{Name: "dry-run", Usage: "only say what would be done"},
		},
		Action: runMigrate,
	}
}

func runMigrate(c *cli.Context) error {
	m := &migration{from: c.String("from"), to: c.String("to"), only: c.Args().Slice(), removeOld: c.Bool("remove-old")}
	if m.from == m.to {
		return usageError{fmt.Errorf("migrate: --from and --to are both %q", m.from)}
	}
	if c.Bool("undo") {
		if m.removeOld {
			return usageError{fmt.Errorf("migrate: --undo removes dedup's snapshots by itself: leave --remove-old out")}
		}
		m.from, m.to, m.removeOld = m.to, m.from, true
	}
	m.out.DryRun = c.Bool("dry-run")
	ctd, err := dialContainerd(c.Context, c.String("containerd-address"))
	if err != nil {
		return err
	}
	defer ctd.Close()
	m.ctd = ctd
	if err := checkSnapshotters(c.Context, ctd, m.from, m.to); err != nil {
		return err
	}
	spaces := []string{c.String("namespace")}
	if c.Bool("all-namespaces") {
		if spaces, err = ctd.NamespaceService().List(c.Context); err != nil {
			return fmt.Errorf("list containerd's namespaces: %w", err)
		}
	}
	if err := m.run(c, spaces); err != nil {
		return fmt.Errorf("migrate: %w", err)
	}
	v := m.result()
	if err := print(c, v, func(w io.Writer, v Migration) {
		writeMigration(w, v, c.Bool("undo"), m.removeOld)
	}); err != nil {
		return err
	}
	return v.failure()
}

// run plans, and does it unless it is a dry run.
func (m *migration) run(c *cli.Context, spaces []string) error {
	for _, ns := range spaces {
		if err := m.plan(c.Context, ns); err != nil {
			return err
		}
	}
	m.order()
	for _, name := range m.only {
		if !slices.ContainsFunc(m.stacks, func(s *stack) bool { return slices.Contains(s.Names, name) }) {
			return fmt.Errorf("no image %q that %s has unpacked in namespace %s: see `ctr -n %s images ls -q`, or name the "+
				"namespace with --namespace",
				name, m.from, strings.Join(spaces, ", "), spaces[0])
		}
	}
	if !m.out.DryRun {
		var removing atomic.Bool
		start := time.Now()
		stop := showProgress(c, func() string {
			if removing.Load() {
				return "checking what " + m.to + " has, and removing what " + m.from + " has"
			}
			done := m.done.Load()
			return fmt.Sprintf("%s of %s of blobs unpacked (%s)%s", size(done), size(m.total), percent(done, m.total),
				remaining(time.Since(start), done, m.total))
		})
		defer stop()
		if err := m.execute(c.Context); err != nil {
			return err
		}
		removing.Store(true)
	}
	if m.removeOld {
		return m.remove(c.Context)
	}
	return nil
}

// checkSnapshotters makes sure that containerd has the snapshotters: a missing one would look like one without
// snapshots.
func checkSnapshotters(ctx context.Context, ctd *client.Client, names ...string) error {
	resp, err := ctd.IntrospectionService().Plugins(ctx, "type==io.containerd.snapshotter.v1")
	if err != nil {
		return fmt.Errorf("ask containerd for its snapshotters: %w", err)
	}
	have := map[string]bool{}
	var all []string
	for _, p := range resp.GetPlugins() {
		if p.GetInitErr() == nil {
			have[p.GetID()] = true
			all = append(all, p.GetID())
		}
	}
	slices.Sort(all)
	for _, name := range names {
		if have[name] {
			continue
		}
		return fmt.Errorf("containerd has no snapshotter %q, only %s\n"+
			"  put it into containerd's configuration:  dedupctl config containerd\n"+
			"  and restart containerd, or name it with --to or --from", name, strings.Join(all, ", "))
	}
	return nil
}

// failure is the error of a migration that left images behind; the table has already said why.
func (v Migration) failure() error {
	left := 0
	for _, i := range v.Images {
		if i.State == stateIncomplete || i.State == stateFailed {
			left++
		}
	}
	if left == 0 {
		return nil
	}
	return fmt.Errorf("migrate: %s of %d not migrated", plural(int64(left), "image", "images"), len(v.Images))
}

func writeMigration(w io.Writer, v Migration, undo, removeOld bool) {
	if len(v.Images) == 0 {
		fmt.Fprintf(w, "%s has unpacked no images there: nothing to do\n", v.From)
		return
	}
	table(w, func(w io.Writer) {
		fmt.Fprintln(w, "NAMESPACE\tIMAGE\tLAYERS\tBLOBS\tSTATE")
		for _, i := range v.Images {
			name := i.Names[0]
			if more := len(i.Names) - 1; more > 0 {
				name += fmt.Sprintf(" +%d", more)
			}
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", i.Namespace, name, count(i.Layers), size(i.BlobBytes), i.State)
		}
	})
	for _, i := range v.Images {
		switch i.State {
		case stateIncomplete:
			fmt.Fprintf(w, "\n%s: %s not in the content store. Fetch what is missing, then migrate again:\n  dedupctl "+
				"complete --namespace %s %s\n",
				i.Names[0], plural(int64(len(i.Missing)), "blob is", "blobs are"), i.Namespace, i.Names[0])
		case stateFailed:
			fmt.Fprintf(w, "\n%s: %s\n", i.Names[0], i.Error)
		}
	}
	fmt.Fprintln(w)
	verb := "removed"
	if v.DryRun {
		verb = "would be removed"
	}
	switch {
	case removeOld:
		fmt.Fprintf(w, "%s of %s %s, %s.\n", plural(v.Removed, "snapshot", "snapshots"), v.From, verb, size(v.RemovedBytes))
	case !v.DryRun:
		fmt.Fprintf(w, "%s still has its snapshots: migrate --remove-old removes those that no container uses.\n", v.From)
	}
	if v.Kept > 0 {
		fmt.Fprintf(w, "%s of %s stay: containers or other images use them.\n", plural(v.Kept, "snapshot", "snapshots"),
			v.From)
	}
	if len(v.Containers) > 0 {
		fmt.Fprintf(w, "They are used by %s: %s\nRecreate these with the snapshotter %s, which also frees what they use.\n",
			plural(int64(len(v.Containers)), "container", "containers"), some(v.Containers), v.To)
	}
	if !v.DryRun && !undo {
		fmt.Fprintf(w, "New containers use %s if their client is set to it: see docs/migrate.md.\n", v.To)
	}
}

// some writes the first few of a list.
func some(list []string) string {
	const few = 5
	if len(list) <= few {
		return strings.Join(list, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(list[:few], ", "), len(list)-few)
}
