// Package doctor takes one look at a node: whether it can serve images with dedup, and how well. It tries things out
// rather than comparing versions, changes nothing, and says for each thing that is wrong what to do.
package doctor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/pelletier/go-toml/v2"

	"github.com/dedup-snapshotter/dedup-snapshotter/cmd/dedupctl/internal/ctdconfig"
)

// Severity of a finding.
type Severity string

const (
	// OK: as it should be.
	OK Severity = "ok"
	// Info: good to know, nothing to do.
	Info Severity = "info"
	// Warning: it serves, but something is slower, larger or less safe than it could be, or will be soon.
	Warning Severity = "warning"
	// Problem: it does not serve, or not rightly, until this is mended.
	Problem Severity = "problem"
)

// Finding is one thing that was looked at.
type Finding struct {
	// Check names it, "<area>.<what>"; it stays the same between versions.
	Check    string   `json:"check"`
	Severity Severity `json:"severity"`
	Message  string   `json:"message"`
	// Remedy says what to do; "" where there is nothing to.
	Remedy string `json:"remedy,omitempty"`
}

// Self is what the daemon says of itself (message DoctorResponse of control.proto); nil when it does not run.
type Self struct {
	Version, Root, RunDir, ContainerdAddress string
	ContainerdVersion, ContainerdError       string
	IdleMounts, LostImages                   []string
	Refuses                                  string
	DamagedLayers                            int64
	// Blobs is the key of that name; what is droppable has its layers stored here.
	Blobs                          string
	DroppableBlobs, DroppableBytes int64
}

// Options tell where to look.
type Options struct {
	// Version of this program.
	Version string
	// Address is the daemon's socket.
	Address string
	// Settings are the daemon's, as far as its config file says.
	Settings Settings
	// Ask asks the daemon; why it cannot be is an error that tells what to do.
	Ask func(context.Context) (*Self, error)
	// Self makes a command that calls lower.MountAsUser with these arguments, for lower.Features.UserNamespace; nil where
	// there is no such program.
	Self func(args ...string) *exec.Cmd
	// ContainerdConfig is containerd's main file; "" is the one that the running containerd was started with.
	ContainerdConfig string
}

// Settings are the keys of the daemon's config file that matter here.
type Settings struct {
	Root              string `toml:"root"`
	Address           string `toml:"address"`
	RunDir            string `toml:"run_dir"`
	ContainerdAddress string `toml:"containerd_address"`
}

// ReadSettings reads the daemon's config file over the defaults in s. A file that is not there changes nothing.
func ReadSettings(path string, s Settings) (Settings, error) {
	b, err := os.ReadFile(path)
	if err == nil {
		err = toml.Unmarshal(b, &s)
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return s, fmt.Errorf("read the daemon's config %s: %w", path, err)
	}
	return s, nil
}

// node is what is being looked at, and what was found.
type node struct {
	Options
	self     *Self
	daemon   ctdconfig.Process // zero when it does not run
	findings []Finding
	idMapped bool // lookAtKernel found that owners can be mapped
}

// Examine looks at everything. It needs root's rights.
func Examine(ctx context.Context, opts Options) ([]Finding, error) {
	n := &node{Options: opts}
	if n.Settings.RunDir == "" {
		n.Settings.RunDir = filepath.Dir(opts.Address)
	}
	n.lookAtDaemon(ctx)
	for _, look := range []func(context.Context){n.lookAtKernel, n.lookAtDisk, n.lookAtContainerd, n.lookAtMounts} {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		look(ctx)
	}
	return n.findings, ctx.Err()
}

func (n *node) add(s Severity, check, remedy, format string, args ...any) {
	n.findings = append(n.findings, Finding{Check: check, Severity: s, Message: fmt.Sprintf(format, args...),
		Remedy: remedy})
}

func (n *node) ok(check, format string, args ...any) { n.add(OK, check, "", format, args...) }

// failed notes that a check could not be made.
func (n *node) failed(check string, err error) {
	n.add(Warning, check, "", "could not be checked: %v", err)
}

// lookAtDaemon asks the daemon, whose word counts over that of its config file.
func (n *node) lookAtDaemon(ctx context.Context) {
	self, err := n.Ask(ctx)
	if err != nil {
		what, _, _ := strings.Cut(err.Error(), "\n")
		n.add(Problem, "daemon.runs", "systemctl start containerd-dedup-grpc; its log: journalctl -u "+
			"containerd-dedup-grpc; or name its socket with --address", "%s", what)
	} else {
		n.self = self
		n.Settings.Root, n.Settings.RunDir, n.Settings.ContainerdAddress = self.Root, self.RunDir, self.ContainerdAddress
		if n.daemon, err = ctdconfig.Listener(ctx, n.Address); err != nil {
			n.failed("daemon.runs", err)
		} else {
			n.ok("daemon.runs", "containerd-dedup-grpc %s runs (pid %d)", self.Version, n.daemon.Pid)
		}
		if self.Version != n.Version {
			n.add(Info, "daemon.version", "after an upgrade: systemctl restart containerd-dedup-grpc (containers go on)",
				"the daemon is %s, dedupctl %s", self.Version, n.Version)
		}
	}
	n.lookAtSocket()
	n.lookAtRoot()
	n.lookAtStore()
}

// lookAtStore tells what the daemon knows to be wrong with what it stores.
func (n *node) lookAtStore() {
	if n.self == nil {
		return
	}
	if damaged := n.self.DamagedLayers; damaged > 0 {
		n.add(Problem, "daemon.damage", "dedupctl fsck names the images; dedupctl fsck --repair repairs what it can",
			"%d layers are damaged and out of service", damaged)
	} else {
		n.ok("daemon.damage", "no layer is known to be damaged (dedupctl fsck verifies all)")
	}
	if lost := n.self.LostImages; len(lost) > 0 {
		n.add(Warning, "daemon.lost", "if root was lost for good: each comes back when it is next used, from containerd's "+
			"blobs; where these are missing, dedupctl complete IMAGE fetches them. "+
			"Containers of before have lost what they wrote: remove them. "+
			"If the disk of root is not mounted: stop the daemon, mount it, and start the daemon again",
			"containerd takes the files of %d images to be here, and they are not: %s", len(lost), some(lost))
	}
	if blobs := n.self.DroppableBlobs; blobs > 0 && n.self.Blobs == "keep" {
		n.add(Info, "daemon.blobs", "dedupctl trim removes them, and blobs = \"drop\" in the daemon's config always; "+
			"docs/blobs.md tells who misses them",
			"%d blobs in containerd's content store, %.1f MB, are of layers that are stored here: no container needs them",
			blobs, float64(n.self.DroppableBytes)/1e6)
	}
	if n.self.Refuses != "" {
		n.add(Problem, "daemon.reserve", "dedupctl images tells what removing each image frees; dedupctl gc "+
			"--chain-images; or a smaller reserve_space or reserve_inodes",
			"new layers are refused: %s", n.self.Refuses)
	} else {
		n.ok("daemon.reserve", "new layers are taken: the reserve of space and inodes is free")
	}
}

// some shows the first of many names.
func some(names []string) string {
	const most = 5
	if len(names) > most {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:most], ", "), len(names)-most)
	}
	return strings.Join(names, ", ")
}

// lookAtSocket: whoever can connect can mount any layer, and is root on the node.
func (n *node) lookAtSocket() {
	fi, err := os.Lstat(n.Address)
	if errors.Is(err, os.ErrNotExist) {
		return // daemon.runs says so
	}
	if err != nil {
		n.failed("daemon.socket", err)
		return
	}
	switch uid := owner(fi); {
	case fi.Mode().Type() != os.ModeSocket:
		n.add(Problem, "daemon.socket", "move it away, or set another address", "%s is no socket", n.Address)
	case uid != 0 || fi.Mode().Perm()&0o077 != 0:
		n.add(Problem, "daemon.socket", fmt.Sprintf("chown root:root %s && chmod 0600 %s", n.Address, n.Address),
			"%s has mode %#o and belongs to uid %d: who can connect to it is root on this node", n.Address, fi.Mode().Perm(),
			uid)
	default:
		n.ok("daemon.socket", "%s is root's alone", n.Address)
	}
	n.lookAtDirectory("daemon.socket-directory", filepath.Dir(n.Address), 0o022,
		"others can put a socket of their own in its place")
}

func (n *node) lookAtRoot() {
	if _, err := os.Stat(n.Settings.Root); err == nil {
		n.lookAtDirectory("daemon.root", n.Settings.Root, 0o077, "others can read the files of all images, or change them")
	}
}

// lookAtDirectory tells of a directory that others have rights in which they should not have.
func (n *node) lookAtDirectory(check, dir string, forbidden os.FileMode, harm string) {
	fi, err := os.Stat(dir)
	if err != nil {
		n.failed(check, err)
		return
	}
	if uid := owner(fi); uid != 0 || fi.Mode().Perm()&forbidden != 0 {
		n.add(Problem, check, fmt.Sprintf("chown root:root %s && chmod 0700 %s", dir, dir),
			"%s has mode %#o and belongs to uid %d: %s", dir, fi.Mode().Perm(), uid, harm)
		return
	}
	n.ok(check, "%s is root's", dir)
}
