package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/log"
	"github.com/docker/go-units"
	"github.com/pelletier/go-toml/v2"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/lower"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/quota"
)

// Config is the daemon's TOML file. docs/configuration.md and deploy/config.toml say the same.
type Config struct {
	// Root holds layers, objects and containers' changes. A local ext4 or XFS.
	Root string `toml:"root"`
	// Address is the unix socket that containerd's proxy_plugins point to.
	Address string `toml:"address"`
	// RunDir holds the mount points of chain images; the socket's directory by default. It must lie
	// in containerd's mount namespace.
	RunDir string `toml:"run_dir"`
	// ContainerdAddress is containerd's own socket, from which blobs are read.
	ContainerdAddress string `toml:"containerd_address"`
	// Fidelity is "exact", "python" or "normalized".
	Fidelity string `toml:"fidelity"`
	// Reuse is "known" (a known layer is served to whoever names its diffID, as containerd does
	// with chainIDs) or "fetched" (only to a pull that has fetched the blob itself).
	Reuse string `toml:"reuse"`
	// Blobs is "keep" (containerd's content store keeps the blobs of all images) or "drop" (those of layers that are
	// stored here go, unless something needs them).
	Blobs string `toml:"blobs"`
	// Recipes: when a blob is removed, the daemon keeps what it takes to make it again from the store, if it can.
	Recipes bool `toml:"recipes"`
	// Durability is "strict" (a layer is served only after all of it is on the disk) or "deferred" (it is written out
	// within ten seconds; what a power cut catches is found at the next start and has to be fetched again).
	Durability string `toml:"durability"`
	// Verity is "auto" (objects and chain images get fs-verity where the file system and the kernel have it), "on" (or the
	// daemon does not start) or "off".
	Verity string `toml:"verity"`
	// PageCache is "shared" (equal files of all images are in memory once, for which the kernel needs data-only lower
	// layers), "private" (the containers of one image share its files) or "": shared where the kernel can.
	PageCache string `toml:"page_cache"`
	// KeepMounted is how long an image stays mounted, and so in memory, after its last container has gone.
	KeepMounted string `toml:"keep_mounted"`
	// ReserveSpace and ReserveInodes are what ingests leave free on root's file system: "1%", or an amount such as
	// "2GB" or "100000".
	ReserveSpace  string `toml:"reserve_space"`
	ReserveInodes string `toml:"reserve_inodes"`
	// MaxMemory bounds what ingests and chain builds keep in memory: "auto", or an amount such as "2GiB".
	MaxMemory string `toml:"max_memory"`
	// ProjectIDs are for containers whose size is limited: "first-last", used by nothing else on root's file system.
	ProjectIDs string `toml:"project_ids"`
	// LogLevel is "trace", "debug", "info", "warn", "error", "fatal" or "panic".
	LogLevel string `toml:"log_level"`
	// MetricsAddress is where Prometheus may ask, an IP address and a port; "" for nowhere.
	MetricsAddress string `toml:"metrics_address"`
	// PprofAddress is where profiles of the daemon can be had, a loopback IP address and a port; "" for nowhere.
	PprofAddress string `toml:"pprof_address"`
}

const (
	defaultConfigFile = "/etc/containerd-dedup-grpc/config.toml"
	reuseKnown        = "known"
	reuseFetched      = "fetched"
	blobsKeep         = "keep"
	blobsDrop         = "drop"
)

func defaultConfig() Config {
	return Config{
		Root:              "/var/lib/containerd-dedup-grpc",
		Address:           "/run/containerd-dedup-grpc/containerd-dedup-grpc.sock",
		ContainerdAddress: "/run/containerd/containerd.sock",
		Fidelity:          string(content.Python),
		Reuse:             reuseKnown,
		Blobs:             blobsKeep,
		Recipes:           true,
		Durability:        string(layer.Strict),
		Verity:            string(lower.VerityAuto),
		KeepMounted:       "30s",
		ReserveSpace:      "1%",
		ReserveInodes:     "1%",
		MaxMemory:         "auto",
		ProjectIDs:        quota.DefaultRange.String(),
		LogLevel:          "info",
	}
}

// loadConfig reads the file over the defaults. A missing default file is no error.
func loadConfig(path string, explicit bool) (Config, error) {
	c := defaultConfig()
	b, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist) && !explicit:
	case err != nil:
		return c, fmt.Errorf("read config: %w", err)
	default:
		d := toml.NewDecoder(bytes.NewReader(b)).DisallowUnknownFields()
		if err := d.Decode(&c); err != nil {
			return c, fmt.Errorf("config %s: %w", path, explainTOML(err))
		}
	}
	if c.RunDir == "" {
		c.RunDir = filepath.Dir(c.Address)
	}
	if err := c.validate(); err != nil {
		return c, fmt.Errorf("config %s: %w", path, err)
	}
	return c, nil
}

func explainTOML(err error) error {
	var unknown *toml.StrictMissingError
	if errors.As(err, &unknown) && len(unknown.Errors) > 0 {
		first := unknown.Errors[0]
		row, _ := first.Position()
		return fmt.Errorf("line %d: unknown key %q (known: root, address, run_dir, containerd_address, fidelity, reuse, "+
			"blobs, recipes, durability, verity, page_cache, keep_mounted, reserve_space, reserve_inodes, max_memory, "+
			"project_ids, log_level, metrics_address, pprof_address)",
			row, strings.Join(first.Key(), "."))
	}
	var decode *toml.DecodeError
	if errors.As(err, &decode) {
		row, col := decode.Position()
		return fmt.Errorf("line %d, column %d: %w", row, col, err)
	}
	return err
}

// maxSocketPath is sockaddr_un's, without the byte that ends it.
const maxSocketPath = 107

func (c Config) validate() error {
	for key, path := range map[string]string{"root": c.Root, "address": c.Address, "run_dir": c.RunDir,
		"containerd_address": c.ContainerdAddress} {
		if !filepath.IsAbs(path) {
			return fmt.Errorf("%s = %q: want an absolute path", key, path)
		}
		if strings.HasSuffix(key, "address") && len(path) > maxSocketPath {
			return fmt.Errorf("%s = %q has %d bytes, and the path of a unix socket at most %d: choose a shorter one",
				key, path, len(path), maxSocketPath)
		}
		// Mount options separate paths with these.
		if key == "root" || key == "run_dir" {
			if strings.ContainsAny(path, ",:\\") {
				return fmt.Errorf("%s = %q: must not hold a comma, colon or backslash", key, path)
			}
		}
	}
	switch content.Fidelity(c.Fidelity) {
	case content.Exact, content.Python, content.Normalized:
	default:
		return fmt.Errorf("fidelity = %q: want \"exact\", \"python\" or \"normalized\"", c.Fidelity)
	}
	if c.Reuse != reuseKnown && c.Reuse != reuseFetched {
		return fmt.Errorf("reuse = %q: want \"known\" or \"fetched\"", c.Reuse)
	}
	if c.Blobs != blobsKeep && c.Blobs != blobsDrop {
		return fmt.Errorf("blobs = %q: want \"keep\" or \"drop\"", c.Blobs)
	}
	if d := layer.Durability(c.Durability); d != layer.Strict && d != layer.Deferred {
		return fmt.Errorf("durability = %q: want \"strict\" or \"deferred\"", c.Durability)
	}
	switch lower.Verity(c.Verity) {
	case lower.VerityAuto, lower.VerityOn, lower.VerityOff:
	default:
		return fmt.Errorf("verity = %q: want \"auto\", \"on\" or \"off\"", c.Verity)
	}
	switch lower.PageCache(c.PageCache) {
	case lower.PageCacheAuto, lower.PageCacheShared, lower.PageCachePrivate:
	default:
		return fmt.Errorf("page_cache = %q: want \"shared\" or \"private\", or leave it out", c.PageCache)
	}
	if _, err := c.linger(); err != nil {
		return err
	}
	if _, err := c.reserve(); err != nil {
		return err
	}
	if _, err := c.memory(); err != nil {
		return err
	}
	if _, err := quota.ParseRange(c.ProjectIDs); err != nil {
		return fmt.Errorf("project_ids = %q: %w", c.ProjectIDs, err)
	}
	if c.MetricsAddress != "" {
		// A name could lead elsewhere tomorrow, and no address would mean all of them.
		if _, err := netip.ParseAddrPort(c.MetricsAddress); err != nil {
			return fmt.Errorf("metrics_address = %q: want an IP address and a port, such as \"127.0.0.1:9741\"",
				c.MetricsAddress)
		}
	}
	if c.PprofAddress != "" {
		if err := checkPprofAddress(c.PprofAddress); err != nil {
			return err
		}
	}
	if err := log.SetLevel(c.LogLevel); err != nil {
		return fmt.Errorf("log_level = %q: want \"trace\", \"debug\", \"info\", \"warn\", \"error\", \"fatal\" or \"panic\"",
			c.LogLevel)
	}
	return nil
}

// reserve reads what ingests leave free.
func (c Config) reserve() (r layer.Reserve, err error) {
	if r.Space, err = amount(c.ReserveSpace); err != nil {
		return r, fmt.Errorf("reserve_space = %q: %w", c.ReserveSpace, err)
	}
	if r.Inodes, err = amount(c.ReserveInodes); err != nil {
		return r, fmt.Errorf("reserve_inodes = %q: %w", c.ReserveInodes, err)
	}
	return r, nil
}

// maxReserve is the largest part of a disk that can be kept free, in percent.
const maxReserve = 90

func amount(text string) (a layer.Amount, err error) {
	wrong := errors.New(`want a part such as "1%" (up to 90%), or an amount such as "2GB" or "100000"`)
	if part, ok := strings.CutSuffix(text, "%"); ok {
		a.Percent, err = strconv.ParseFloat(strings.TrimSpace(part), 64)
		if err != nil || !(a.Percent >= 0 && a.Percent <= maxReserve) {
			return a, wrong
		}
		return a, nil
	}
	if a.Fixed, err = units.FromHumanSize(text); err != nil || a.Fixed < 0 {
		return a, wrong
	}
	return a, nil
}
