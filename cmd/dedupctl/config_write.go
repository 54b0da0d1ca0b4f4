package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/dedup-snapshotter/dedup-snapshotter/cmd/dedupctl/internal/ctdconfig"
)

// ConfigChanges is what `config containerd --write --json` and `--remove --json` print.
type ConfigChanges struct {
	Config  string       `json:"config"` // containerd's main file
	Changes []FileChange `json:"changes"`
}

// FileChange is one file that was changed.
type FileChange struct {
	Path   string `json:"path"`
	Action string `json:"action"` // "create", "change" or "remove"
}

func writeDropIn(c *cli.Context, p snippet, text string) error {
	path, err := containerdConfigPath(c)
	if err != nil {
		return err
	}
	whole := p.Version == 2 // containerd 1.7
	dropInPath, err := ctdconfig.DropInPath(path)
	if err != nil {
		return err
	}
	have, err := ctdconfig.Read(path, whole, dropInPath)
	if err != nil {
		return err
	}
	if whole && have.Version < 2 && len(have.Files) > 0 {
		return fmt.Errorf("%s is in the old format (version 1), which containerd 1.7 does not read together with a "+
			"drop-in of version 2: "+
			"put version = 2 at its top, write plugins by their full names (\"io.containerd.grpc.v1.cri\" for \"cri\"), "+
			"then run this again", path)
	}
	if p.DaemonSet && have.Discards() {
		return fmt.Errorf("discard_unpacked_layers is true in %s: containerd gives up the layers of an image once overlayfs "+
			"has unpacked it, the pause image first, and no pod of the runtime class could start. Set it to false there, "+
			"restart containerd, pull the images again that are there already, the pause image too, then run this again; "+
			"or run the daemon on the node (docs/kubernetes.md)", strings.Join(have.Files, ", "))
	}
	dropIn, err := have.DropIn(text, whole)
	if err != nil {
		return err
	}
	plan, err := ctdconfig.Install(path, dropIn, p.Version)
	if err != nil {
		return err
	}
	if len(plan) > 0 {
		conn, err := dial(c.Context, p.Address)
		if err == nil {
			conn.Close()
		} else if !errors.Is(err, fs.ErrPermission) {
			fmt.Fprintf(c.App.ErrWriter, "note: containerd-dedup-grpc does not run yet (no answer on %s): start it before "+
				"you restart containerd, or pulls fail\n", p.Address)
		}
	}
	if err := carryOut(c, path, plan); err != nil {
		return err
	}
	return overridden(path, whole, p)
}

// overridden tells of a file that counts over the drop-in.
func overridden(path string, whole bool, p snippet) error {
	c, err := ctdconfig.Read(path, whole)
	if err != nil {
		return err
	}
	order := ctdconfig.Strings(c.Plugin(ctdconfig.DiffService)["default"])
	if p.DaemonSet && slices.Contains(order, "dedup-diff") {
		return fmt.Errorf("the diff service's default in %s has dedup-diff: no pod could be pulled while "+
			"the daemon's pod is away; take it out of there", strings.Join(c.Files, ", "))
	}
	first := len(order) > 0 && order[0] == "dedup-diff"
	if c.Proxy("dedup")["address"] != p.Address || !first && !p.DaemonSet {
		return fmt.Errorf("what was installed does not count, since a later one of %s says something else: "+
			"take proxy_plugins.dedup and the diff service's default out of it", strings.Join(c.Files[1:], ", "))
	}
	return nil
}

func removeDropIn(c *cli.Context) error {
	path, err := containerdConfigPath(c)
	if err != nil {
		return err
	}
	plan, err := ctdconfig.Remove(path)
	if err != nil {
		return err
	}
	return carryOut(c, path, plan)
}

// containerdConfigPath returns the main file of the containerd that runs, or the one that the user names.
func containerdConfigPath(c *cli.Context) (string, error) {
	if path := c.String("containerd-config"); path != "" {
		return filepath.Abs(path)
	}
	p, err := ctdconfig.Listener(c.Context, c.String("containerd-address"))
	if err != nil {
		return ctdconfig.DefaultPath, nil // not running: it will start with its default
	}
	if p.OtherMounts {
		return "", fmt.Errorf("containerd (pid %d) runs in another mount namespace, so its config is not a file here: "+
			"run this there, or name the file with --containerd-config", p.Pid)
	}
	return p.Config(ctdconfig.DefaultPath)
}

// carryOut shows a plan, asks, and executes it.
func carryOut(c *cli.Context, config string, plan []ctdconfig.Change) error {
	v := ConfigChanges{Config: config, Changes: []FileChange{}}
	for _, change := range plan {
		action := "change"
		switch {
		case change.Before == nil:
			action = "create"
		case change.After == nil:
			action = "remove"
		}
		v.Changes = append(v.Changes, FileChange{change.Path, action})
	}
	if len(plan) > 0 {
		if err := confirm(c, v); err != nil {
			return err
		}
		err := ctdconfig.Execute(plan)
		if errors.Is(err, fs.ErrPermission) {
			return fmt.Errorf("%w: run as root (sudo dedupctl ...)", err)
		}
		if err != nil {
			return err
		}
	}
	return print(c, v, func(w io.Writer, v ConfigChanges) {
		if len(v.Changes) == 0 {
			fmt.Fprintf(w, "nothing to do: %s has all that dedup needs\n", v.Config)
			return
		}
		for _, f := range v.Changes {
			fmt.Fprintf(w, "%sd %s\n", f.Action, f.Path)
		}
		fmt.Fprintln(w, "now restart containerd:  systemctl restart containerd  (running containers go on)")
	})
}

// confirm asks unless --yes says that nobody wants to be asked.
func confirm(c *cli.Context, v ConfigChanges) error {
	if c.Bool("yes") {
		return nil
	}
	if !terminal(os.Stdin) {
		return usageError{errors.New("this changes containerd's configuration and asks before it does: add --yes where " +
			"nobody can answer")}
	}
	for _, f := range v.Changes {
		fmt.Fprintf(c.App.ErrWriter, "%s %s\n", f.Action, f.Path)
	}
	fmt.Fprint(c.App.ErrWriter, "Go on? [y/N] ")
	answer, err := bufio.NewReader(os.Stdin).ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("read the answer: %w", err)
	}
	if answer = strings.ToLower(strings.TrimSpace(answer)); answer != "y" && answer != "yes" {
		return errors.New("nothing was changed")
	}
	return nil
}
