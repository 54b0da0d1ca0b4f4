package doctor

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	introspection "github.com/containerd/containerd/api/services/introspection/v1"
	versionapi "github.com/containerd/containerd/api/services/version/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/dedup-snapshotter/dedup-snapshotter/cmd/dedupctl/internal/ctdconfig"
)

const (
	answerTimeout = 10 * time.Second
	install       = "dedupctl config containerd --write, then restart containerd"
)

// containerd is the one that the daemon is for.
type containerd struct {
	process ctdconfig.Process
	version string
	plugins []*introspection.Plugin
	config  *ctdconfig.Config // nil where it cannot be read
}

// old tells whether its config replaces whole sections.
func (c *containerd) old() bool { return strings.HasPrefix(strings.TrimPrefix(c.version, "v"), "1.") }

// lookAtContainerd asks containerd what it knows of the daemon, and reads its configuration.
func (n *node) lookAtContainerd(ctx context.Context) {
	socket := n.Settings.ContainerdAddress
	c, err := n.askContainerd(ctx, socket)
	if err != nil {
		n.add(Problem, "containerd.runs", "systemctl start containerd; or set containerd_address in the daemon's config "+
			"to its socket (grpc.address in containerd's)",
			"containerd does not answer on %s: %v", socket, err)
		return
	}
	n.lookAtVersion(c)
	n.lookAtNamespaces(c)
	if n.self != nil {
		if n.self.ContainerdError != "" {
			n.add(Problem, "containerd.reached",
				"restart the daemon: systemctl restart containerd-dedup-grpc; if it stays, see journalctl -u containerd-dedup-grpc",
				"the daemon does not reach containerd: %s", n.self.ContainerdError)
		} else {
			n.ok("containerd.reached", "the daemon reaches containerd on %s", socket)
		}
	}
	n.readConfig(c)
	n.lookAtSnapshotPlugin(c)
	n.lookAtDiffPlugin(c)
	if c.config != nil {
		n.lookAtDifferOrder(c.config)
		n.lookAtUnpackConfig(c.config)
		n.lookAtCRI(c.config)
	}
}

func (n *node) askContainerd(ctx context.Context, socket string) (*containerd, error) {
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	c := &containerd{}
	var err error
	if c.process, err = ctdconfig.Listener(ctx, socket); err != nil {
		return nil, err
	}
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	v, err := versionapi.NewVersionClient(conn).Version(ctx, &emptypb.Empty{})
	if err != nil {
		return nil, fmt.Errorf("ask for its version: %s", status.Convert(err).Message())
	}
	c.version = v.GetVersion()
	p, err := introspection.NewIntrospectionClient(conn).Plugins(ctx, &introspection.PluginsRequest{})
	if err != nil {
		return nil, fmt.Errorf("ask for its plugins: %s", status.Convert(err).Message())
	}
	c.plugins = p.GetPlugins()
	return c, nil
}

func (n *node) lookAtVersion(c *containerd) {
	var major, minor int
	if _, err := fmt.Sscanf(strings.TrimPrefix(c.version, "v"), "%d.%d", &major, &minor); err != nil {
		n.add(Info, "containerd.version", "", "containerd says version %q, which is no version", c.version)
		return
	}
	if major < 1 || major == 1 && minor < 7 {
		n.add(Problem, "containerd.version", "containerd 1.7 or newer", "containerd %s is too old", c.version)
		return
	}
	n.ok("containerd.version", "containerd %s runs (pid %d)", c.version, c.process.Pid)
}

// staging tells whether containerd wants the capability "rebase" (2.4); older ones would fetch what is known.
func staging(version string) bool { return since(version, 2, 4) }

// since tells whether a version is this one or newer.
func since(version string, major, minor int) bool {
	var have, part int
	_, err := fmt.Sscanf(strings.TrimPrefix(version, "v"), "%d.%d", &have, &part)
	return err == nil && (have > major || have == major && part >= minor)
}

// lookAtNamespaces: containerd has to see what the daemon mounts.
func (n *node) lookAtNamespaces(c *containerd) {
	const remedy = "run both in the host's mount namespace: no PrivateTmp, ProtectSystem, ProtectHome, PrivateMounts " +
		"or ReadWritePaths in either unit; " +
		"in a container, hostPID with nsenter, or the mounts shared both ways"
	switch {
	case n.daemon.Pid != 0 && n.daemon.Mounts != c.process.Mounts:
		n.add(Problem, "containerd.mount-namespace", remedy,
			"containerd (pid %d) and the daemon (pid %d) are in different mount namespaces: "+
				"containers find their files missing", c.process.Pid, n.daemon.Pid)
	case n.daemon.Pid == 0 && c.process.OtherMounts:
		n.add(Warning, "containerd.mount-namespace", remedy,
			"containerd (pid %d) has a mount namespace of its own, which the daemon has to share", c.process.Pid)
	default:
		n.ok("containerd.mount-namespace", "containerd and the daemon see the same mounts")
	}
}

func (n *node) readConfig(c *containerd) {
	path := n.ContainerdConfig
	var err error
	if path == "" {
		if c.process.OtherMounts {
			n.add(Info, "containerd.config", "name a copy of it with --containerd-config",
				"containerd's config is in another mount namespace, and was not read")
			return
		}
		path, err = c.process.Config(ctdconfig.DefaultPath)
	}
	if err == nil {
		c.config, err = ctdconfig.Read(path, c.old())
	}
	if err != nil {
		n.add(Warning, "containerd.config", "repair the file: containerd cannot restart with it", "%v", err)
		return
	}
	switch more := len(c.config.Files) - 1; {
	case more < 0:
		n.add(Info, "containerd.config", "", "containerd has no config file %s: it runs with its defaults", path)
	case more == 0:
		n.ok("containerd.config", "its config is %s", path)
	default:
		n.ok("containerd.config", "its config is %s and %d imported", path, more)
	}
}

// ours finds the plugins of a type that lead to the daemon.
func (n *node) ours(c *containerd, kind string) (found []*introspection.Plugin) {
	for _, p := range c.plugins {
		if address := p.GetExports()["address"]; p.GetType() == kind && address != "" &&
			filepath.Clean(address) == filepath.Clean(n.Address) {
			found = append(found, p)
		}
	}
	return found
}

// missing tells of a proxy plugin that containerd does not have.
func (n *node) missing(c *containerd, check, name, kind, means string) {
	if c.config != nil {
		if address, _ := c.config.Proxy(name)["address"].(string); address != "" &&
			filepath.Clean(address) == filepath.Clean(n.Address) {
			n.add(Problem, check, "systemctl restart containerd (containers go on)",
				"containerd's config has the %s plugin %q, but containerd was started before it was there", kind, name)
			return
		} else if address != "" {
			n.add(Problem, check, install, "the %s plugin %q of containerd's config points to %s, the daemon listens on %s",
				kind, name, address, n.Address)
			return
		}
	}
	n.add(Problem, check, install, "containerd has no %s plugin with the daemon's socket %s: %s", kind, n.Address, means)
}

func (n *node) lookAtSnapshotPlugin(c *containerd) {
	found := n.ours(c, "io.containerd.snapshotter.v1")
	if len(found) == 0 {
		n.missing(c, "containerd.snapshotter", "dedup", "snapshot", "nothing can be pulled with it")
		return
	}
	for _, p := range found {
		if e := p.GetInitErr(); e != nil {
			n.add(Problem, "containerd.snapshotter", "see journalctl -u containerd",
				"containerd could not start the snapshot plugin %q: %s", p.GetID(), e.GetMessage())
			continue
		}
		n.ok("containerd.snapshotter", "containerd knows the daemon as snapshotter %q", p.GetID())
		switch root := p.GetExports()["root"]; {
		case root == "":
			n.add(Warning, "containerd.exports-root", install,
				"the proxy plugin %q has no exports.root: the kubelet cannot measure the image file system", p.GetID())
		case filepath.Clean(root) != filepath.Clean(n.Settings.Root):
			n.add(Warning, "containerd.exports-root", install,
				"exports.root of %q is %s, the daemon's root %s: the kubelet measures the wrong file system", p.GetID(), root,
				n.Settings.Root)
		default:
			n.ok("containerd.exports-root", "exports.root is the daemon's root")
		}
		has, wants := slices.Contains(p.GetCapabilities(), "rebase"), staging(c.version)
		switch {
		case has && !wants:
			n.add(Problem, "containerd.capabilities", install,
				"capability \"rebase\" with containerd %s: it downloads and unpacks what is known", c.version)
		case !has && wants:
			n.add(Info, "containerd.capabilities", install,
				"no capability \"rebase\": containerd cannot unpack layers side by side (max_concurrent_unpacks)")
		default:
			n.ok("containerd.capabilities", "capabilities fit containerd %s", c.version)
		}
		maps, mapper := slices.Contains(p.GetCapabilities(), "remap-ids"), since(c.version, 2, 0)
		switch {
		case maps && !mapper:
			n.add(Problem, "containerd.remap-ids", install,
				"capability \"remap-ids\" with containerd %s, which maps no owners: pods in user namespaces do not start",
				c.version)
		case maps && !n.idMapped:
			n.add(Problem, "containerd.remap-ids", install,
				"capability \"remap-ids\" on a kernel that cannot (kernel.id-mapped): pods in user namespaces do not start")
		case !maps && mapper && n.idMapped:
			n.add(Warning, "containerd.remap-ids", install,
				"no capability \"remap-ids\": containerd copies all files for each pod in a user namespace (hostUsers: false)")
		default:
			n.ok("containerd.remap-ids", "user namespaces are served as containerd %s and the kernel can", c.version)
		}
	}
}

func (n *node) lookAtDiffPlugin(c *containerd) {
	found := n.ours(c, "io.containerd.differ.v1")
	if len(found) == 0 {
		n.missing(c, "containerd.differ", "dedup-diff", "diff",
			"every layer is written out as plain files first, and read again")
		return
	}
	n.ok("containerd.differ", "containerd knows the daemon as differ %q", found[0].GetID())
}

func (n *node) lookAtDifferOrder(c *ctdconfig.Config) {
	order := ctdconfig.Strings(c.Plugin(ctdconfig.DiffService)["default"])
	ours := slices.IndexFunc(order, func(name string) bool { return leadsTo(c, name, n.Address) })
	walking := slices.Index(order, "walking")
	switch {
	case ours < 0 && c.Discards():
		n.add(Problem, "containerd.differ-order", "set discard_unpacked_layers = false, restart containerd, and pull images "+
			"again, the pause image too; or let CRI use dedup for all pods: dedupctl config containerd --write --cri",
			"discard_unpacked_layers is true, and the diff service's order %v has no dedup-diff: the layers of an image that "+
				"overlayfs has unpacked are gone, and dedup cannot unpack them", order)
	case ours < 0:
		n.add(Warning, "containerd.differ-order", install,
			"the diff service's order %v has no dedup-diff: what CRI and nerdctl "+
				"pull is written out as plain files first. As it has to be where the daemon is a DaemonSet's pod", order)
	case walking >= 0 && walking < ours:
		n.add(Warning, "containerd.differ-order", install,
			"the diff service's order %v asks walking first: what CRI and nerdctl pull is written out as plain files first",
			order)
	default:
		n.ok("containerd.differ-order", "the diff service asks %s first", order[ours])
	}
}

// leadsTo tells whether a proxy plugin leads to an address.
func leadsTo(c *ctdconfig.Config, name, address string) bool {
	to, _ := c.Proxy(name)["address"].(string)
	return to != "" && filepath.Clean(to) == filepath.Clean(address)
}

func (n *node) lookAtUnpackConfig(c *ctdconfig.Config) {
	entries := ctdconfig.Tables(c.Plugin(ctdconfig.Transfer)["unpack_config"])
	differs, others := "", false
	for _, e := range entries {
		snapshotter, _ := e["snapshotter"].(string)
		differ, _ := e["differ"].(string)
		if leadsTo(c, snapshotter, n.Address) {
			differs = differ
			if differ == "" {
				differs = "the default"
			}
		}
		others = others || snapshotter == "overlayfs"
	}
	switch {
	case differs == "":
		n.add(Warning, "containerd.unpack-config", install, "unpack_config of the transfer service has no entry for "+
			"dedup: ctr image pull --snapshotter dedup (2.x) finds nobody to unpack")
	case !leadsTo(c, differs, n.Address):
		n.add(Warning, "containerd.unpack-config", install,
			"unpack_config unpacks for dedup with %s: every layer is written out as plain files first", differs)
	case !others:
		n.add(Warning, "containerd.unpack-config", install, "unpack_config has no entry for overlayfs, since it replaces "+
			"the built-in list: ctr image pull without --snapshotter finds nobody to unpack")
	default:
		n.ok("containerd.unpack-config", "the transfer service unpacks for dedup with %s, and for overlayfs", differs)
	}
}

func (n *node) lookAtCRI(c *ctdconfig.Config) {
	name, _ := c.Plugin("io.containerd.cri.v1.images")["snapshotter"].(string)
	if old, ok := c.Plugin("io.containerd.grpc.v1.cri")["containerd"].(map[string]any); ok && name == "" {
		name, _ = old["snapshotter"].(string)
	}
	if leadsTo(c, name, n.Address) {
		n.ok("containerd.cri", "the kubelet's images come through dedup")
		return
	}
	if name == "" {
		name = "containerd's default, overlayfs"
	}
	n.add(Info, "containerd.cri", "where this is a Kubernetes node: dedupctl config containerd --cri --write",
		"CRI's snapshotter is %s: what the kubelet pulls does not come through dedup", name)
}
