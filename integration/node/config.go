package node

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"

	"github.com/pelletier/go-toml/v2"
)

// Names under which the daemon is known to containerd, in all examples too.
const (
	Snapshotter = "dedup"
	Differ      = "dedup-diff"
)

type table = map[string]any

// containerdConfig renders the configuration of containerd. Everything that would lie at
// a fixed place of the machine is moved below the node's directory or switched off.
func (l *layout) containerdConfig() ([]byte, error) {
	disabled := []string{
		"io.containerd.snapshotter.v1.btrfs",
		"io.containerd.snapshotter.v1.devmapper",
		"io.containerd.snapshotter.v1.zfs",
		"io.containerd.snapshotter.v1.blockfile",
	}
	const nri = "io.containerd.nri.v1.nri" // listens on a fixed path, if it is not given another
	if _, ok := l.opts.Plugins[nri]; !ok {
		disabled = append(disabled, nri)
	}
	if !l.opts.CRI {
		disabled = append(disabled, "io.containerd.grpc.v1.cri",
			"io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime")
	}
	version := 3
	if strings.HasPrefix(l.tools.Version, "1.") {
		version = 2
	}
	proxies := table{}
	if !l.opts.NoDedup {
		proxies[Snapshotter] = table{
			"type": "snapshot", "address": l.DedupAddress(),
			"exports": table{"root": l.DedupRoot()},
		}
		if list := capabilities(l); len(list) > 0 {
			proxies[Snapshotter].(table)["capabilities"] = list
		}
		if !l.opts.NoDiffer {
			proxies[Differ] = table{"type": "diff", "address": l.DedupAddress()}
		}
	}
	for name, address := range l.opts.Proxies {
		proxies[name] = table{"type": "snapshot", "address": address}
	}
	plugins := table{
		"io.containerd.internal.v1.opt":          table{"path": filepath.Join(l.dir, "opt")},
		"io.containerd.service.v1.diff-service":  table{"default": l.differs()},
		"io.containerd.transfer.v1.local":        table{"unpack_config": l.unpackConfig()},
		"io.containerd.image-verifier.v1.bindir": table{"bin_dir": filepath.Join(l.dir, "opt/verifier")},
		"io.containerd.monitor.task.v1.cgroups":  table{"no_prometheus": true},
	}
	if l.opts.CRI {
		maps.Copy(plugins, l.criConfig(version))
	}
	for id, more := range l.opts.Plugins {
		if have, ok := plugins[id].(table); ok {
			maps.Copy(have, more)
			continue
		}
		plugins[id] = more
	}
	return encode(table{
		"version":          version,
		"root":             filepath.Join(l.dir, "c"),
		"state":            filepath.Join(l.dir, "s"),
		"temp":             filepath.Join(l.dir, "tmp"),
		"disabled_plugins": disabled,
		"grpc":             table{"address": l.Address()},
		"ttrpc":            table{"address": l.Address() + ".ttrpc"},
		"debug":            table{"level": l.opts.LogLevel},
		"proxy_plugins":    proxies,
		"plugins":          plugins,
	})
}

// criConfig is the part that CRI reads. Its default snapshotter is dedup, if that is there.
func (l *layout) criConfig(version int) table {
	snapshotter := Snapshotter
	if l.opts.NoDedup {
		snapshotter = "overlayfs"
	}
	sandboxes := table{"default_runtime_name": "runc", "runtimes": table{"runc": table{
		"runtime_type": "io.containerd.runc.v2",
		"options":      table{"Root": filepath.Join(l.dir, "runc")},
	}}}
	cni := table{"conf_dir": filepath.Join(l.dir, "opt/cni/net.d")}
	if version == 2 {
		sandboxes["snapshotter"] = snapshotter
		return table{"io.containerd.grpc.v1.cri": table{
			"sandbox_image": l.opts.PauseImage, "stats_collect_period": 1, "disable_apparmor": true,
			"restrict_oom_score_adj": true,
			"containerd":             sandboxes, "cni": cni,
		}}
	}
	return table{
		"io.containerd.cri.v1.images": table{
			"snapshotter": snapshotter, "stats_collect_period": 1, "pinned_images": table{"sandbox": l.opts.PauseImage},
		},
		"io.containerd.cri.v1.runtime": table{
			"disable_apparmor": true, "restrict_oom_score_adj": true, "containerd": sandboxes, "cni": cni,
		},
	}
}

// AtLeast reports whether a version of containerd is major.minor or newer.
func AtLeast(version string, major, minor int) bool {
	var x, y int
	_, err := fmt.Sscanf(version, "%d.%d", &x, &y)
	return err == nil && (x > major || x == major && y >= minor)
}

// capabilities are what the version of containerd may expect of the snapshotter.
func capabilities(l *layout) (list []string) {
	// From here on containerd commits read-only mounts without applying anything to them. Older ones with this capability
	// would fetch and apply even what is known.
	if AtLeast(l.tools.Version, 2, 4) {
		list = append(list, "rebase")
	}
	if !l.opts.NoRemapIDs && AtLeast(l.tools.Version, 2, 0) {
		list = append(list, "remap-ids")
	}
	return list
}

// differs is the order in which containerd asks differs to apply or compare.
func (l *layout) differs() []string {
	order := []string{"walking"}
	if l.opts.erofs != "" {
		order = append([]string{"erofs"}, order...)
	}
	if !l.opts.NoDedup && !l.opts.NoDiffer {
		order = append([]string{Differ}, order...)
	}
	return order
}

// unpackConfig tells the transfer service, which ctr's pull uses, who unpacks for whom.
func (l *layout) unpackConfig() []table {
	entry := func(snapshotter, differ string) table {
		return table{"platform": "linux", "snapshotter": snapshotter, "differ": differ}
	}
	entries := []table{entry("overlayfs", "walking"), entry("native", "walking")}
	if l.opts.erofs != "" {
		entries = append(entries, entry("erofs", "erofs"))
	}
	for name := range l.opts.Proxies {
		entries = append(entries, entry(name, "walking"))
	}
	switch {
	case l.opts.NoDedup:
	case l.opts.NoDiffer:
		entries = append(entries, entry(Snapshotter, "walking"))
	default:
		entries = append(entries, entry(Snapshotter, Differ))
	}
	return entries
}

// daemonConfig renders the configuration of the dedup daemon.
func (l *layout) daemonConfig() ([]byte, error) {
	t := table{
		"root":               l.DedupRoot(),
		"address":            l.DedupAddress(),
		"containerd_address": l.Address(),
	}
	if cache := os.Getenv("DEDUP_TEST_PAGE_CACHE"); cache != "" {
		t["page_cache"] = cache
	}
	maps.Copy(t, l.opts.Daemon)
	return encode(t)
}

func encode(t table) ([]byte, error) {
	var buf bytes.Buffer
	if err := toml.NewEncoder(&buf).Encode(t); err != nil {
		return nil, fmt.Errorf("encode config: %w", err)
	}
	return buf.Bytes(), nil
}

// fillBin puts what containerd, the shim and the daemon run into the node's bin
// directory, which is their whole PATH.
func (l *layout) fillBin() error {
	links := map[string]string{}
	for _, name := range []string{"containerd", "ctr", "containerd-shim-runc-v2"} {
		links[name] = filepath.Join(l.tools.Dir, name)
	}
	names := []string{"runc", "mount", "umount", "modprobe", "losetup"}
	if l.opts.ExternalGzip {
		names = append(names, "igzip", "unpigz")
	}
	for _, name := range names {
		if path, err := LookPath(name); err == nil {
			links[name] = path
		}
	}
	if l.opts.Runc != "" {
		links["runc"] = l.opts.Runc
	}
	if path, err := MkfsErofs(); err == nil && AtLeast(l.tools.Version, 2, 1) { // older ones have no erofs
		links["mkfs.erofs"], l.opts.erofs = path, path
	}
	for name, target := range links {
		if err := os.Symlink(target, filepath.Join(l.dir, "bin", name)); err != nil {
			return fmt.Errorf("fill the node's PATH: %w", err)
		}
	}
	return nil
}
