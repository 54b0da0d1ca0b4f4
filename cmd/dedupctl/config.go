package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/template"
	"time"

	versionapi "github.com/containerd/containerd/api/services/version/v1"
	"github.com/urfave/cli/v2"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/dedup-snapshotter/dedup-snapshotter/cmd/dedupctl/internal/doctor"
)

// versionTimeout bounds the question for containerd's version, which is answered from memory.
const versionTimeout = 10 * time.Second

func configCommand() *cli.Command {
	return &cli.Command{
		Name:  "config",
		Usage: "configuration for other programs",
		Subcommands: []*cli.Command{{
			Name:  "containerd",
			Usage: "print what containerd's config.toml needs, or install it",
			Description: "Prints the part of containerd's config.toml that makes the daemon known to it, in the form that\n" +
				"the running containerd reads, or the one given with --containerd-version.\n" +
				"--write puts it beside the config.toml of that containerd, as conf.d/dedup-snapshotter.toml, and adds that\n" +
				"to its imports; --remove undoes that. Both show what they will do and ask. Restart containerd after either.",
			Flags: []cli.Flag{
				&cli.StringFlag{Name: "containerd-version", Usage: "write for this `VERSION`, without asking containerd"},
				&cli.StringFlag{Name: "containerd-address", Usage: "containerd's `SOCKET`", Value: defaultContainerd},
				&cli.StringFlag{Name: "containerd-config",
					Usage: "containerd's main config `FILE`; by default the one that the running containerd was started with"},
				&cli.StringFlag{Name: "root", Usage: "the daemon's root `DIR`; asked from the daemon when it runs",
					Value: defaultRoot},
				&cli.BoolFlag{Name: "cri", Usage: "make it the kubelet's snapshotter, too"},
				&cli.BoolFlag{Name: "daemonset", Usage: "for a daemon that runs as a pod: what others pull never asks it"},
				&cli.BoolFlag{Name: "write", Usage: "install it as a drop-in, after asking"},
				&cli.BoolFlag{Name: "remove", Usage: "take away what --write installed, after asking"},
				&cli.BoolFlag{Name: "yes", Aliases: []string{"y"}, Usage: "do not ask"},
			},
			Action: configureContainerd,
		}},
	}
}

// ContainerdConfig is what `config containerd --json` prints.
type ContainerdConfig struct {
	ContainerdVersion string `json:"containerd_version"`
	ConfigVersion     int    `json:"config_version"`
	TOML              string `json:"toml"`
}

func configureContainerd(c *cli.Context) error {
	switch {
	case c.Bool("write") && c.Bool("remove"):
		return usageError{errors.New("config containerd: --write and --remove exclude each other")}
	case c.Bool("cri") && c.Bool("daemonset"):
		return usageError{errors.New("config containerd: --cri and --daemonset exclude each other: " +
			"the daemon's own pod has to start without it")}
	case c.Bool("remove"):
		return removeDropIn(c)
	}
	p, err := containerdSnippet(c)
	if err != nil {
		return err
	}
	out, err := p.render()
	if err != nil {
		return err
	}
	if c.Bool("write") {
		return writeDropIn(c, p, out)
	}
	return print(c, ContainerdConfig{ContainerdVersion: p.Containerd, ConfigVersion: p.Version, TOML: out},
		func(w io.Writer, v ContainerdConfig) { fmt.Fprint(w, v.TOML) })
}

// containerdSnippet finds out what the config has to say.
func containerdSnippet(c *cli.Context) (p snippet, err error) {
	text := c.String("containerd-version")
	asked := text == ""
	if asked {
		if text, err = askContainerd(c.Context, c.String("containerd-address")); err != nil {
			return p, err
		}
	}
	p = snippet{Containerd: text, Address: address(c), Root: c.String("root"), CRI: c.Bool("cri"),
		DaemonSet: c.Bool("daemonset")}
	if p.Version, p.Staging, err = configVersion(text); err != nil && !asked {
		return p, usageError{err}
	} else if err != nil {
		return p, err
	}
	if !c.IsSet("root") {
		// A daemon that does not run yet has nothing to say about this.
		if s, err := askStatus(c, false); err == nil {
			p.Root = s.Root
		}
	}
	p.Maps = p.Version > 2 && doctor.MapsIDs(p.Root) == nil
	return p, nil
}

func askContainerd(ctx context.Context, socket string) (string, error) {
	const hint = "\n  or say what you run:  --containerd-version 2.1"
	conn, err := dial(ctx, socket)
	if err != nil {
		return "", fmt.Errorf("%w%s", explainDial(socket, "containerd", "--containerd-address", err), hint)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, versionTimeout)
	defer cancel()
	r, err := versionapi.NewVersionClient(conn).Version(ctx, &emptypb.Empty{})
	if err != nil {
		return "", fmt.Errorf("ask %s for containerd's version: %s%s", socket, status.Convert(err).Message(), hint)
	}
	return r.GetVersion(), nil
}

// configVersion returns the version of the config.toml format that suits a containerd, and whether it
// takes read-only mounts for a layer that is there already (2.4). 2.x reads version 2 as well, but tells to
// migrate it at every start.
func configVersion(containerd string) (version int, staging bool, err error) {
	var major, minor int
	// What follows is a patch level, a pre-release or a distribution's mark: "2.0-beta.1", "1.7~ds1".
	if _, err := fmt.Sscanf(strings.TrimPrefix(containerd, "v"), "%d.%d", &major, &minor); err != nil {
		return 0, false, fmt.Errorf("containerd version %q: want one like 1.7 or 2.1.4", containerd)
	}
	switch {
	case major >= 2:
		return 3, major > 2 || minor >= 4, nil
	case major == 1 && minor >= 7:
		return 2, false, nil
	}
	return 0, false, fmt.Errorf("containerd %s is too old: dedup-snapshotter works with 1.7 and newer", containerd)
}

// snippet is what containerd's config.toml needs.
type snippet struct {
	Containerd string
	Version    int // of the format of config.toml
	Address    string
	Root       string
	CRI        bool
	// DaemonSet: no client's unpacking may need the daemon unless it is for dedup.
	DaemonSet bool
	// Staging: unpacking layers side by side goes together with serving known ones.
	Staging bool
	// Maps: containerd maps the owners of files for containers in user namespaces, and the kernel can.
	Maps bool
}

// Capabilities are what containerd may expect of the snapshotter.
func (p snippet) Capabilities() (list []string) {
	if p.Staging {
		list = append(list, tomlString("rebase"))
	}
	if p.Maps {
		list = append(list, tomlString("remap-ids"))
	}
	return list
}

func (p snippet) render() (string, error) {
	var b strings.Builder
	if err := snippetTemplate.Execute(&b, p); err != nil {
		return "", fmt.Errorf("render config: %w", err)
	}
	return b.String(), nil
}

// The unpack_config of config.toml replaces containerd's built-in one, which has overlayfs alone:
// without repeating that, a plain `ctr image pull` finds nobody to unpack. The first entry
// serves who asks for no snapshotter.
var snippetTemplate = template.Must(template.New("").Funcs(template.FuncMap{
	"quote": tomlString, "join": strings.Join,
}).Parse(
	`# For containerd {{.Containerd}}: merge into /etc/containerd/config.toml, then restart containerd.
version = {{.Version}}

[proxy_plugins.dedup]
  type = "snapshot"
  address = {{quote .Address}}
  # Where the kubelet measures the image file system.
  exports = { root = {{quote .Root}} }
{{- if .Staging}}
  # rebase allows max_concurrent_unpacks > 1. Only for containerd 2.4 and newer: older ones would fetch what is known.
{{- end}}
{{- if .Maps}}
  # remap-ids: pods with hostUsers: false share files. Only where "dedupctl doctor" finds kernel.id-mapped ok.
{{- end}}
{{- with .Capabilities}}
  capabilities = [{{join . ", "}}]
{{- end}}

[proxy_plugins.dedup-diff]
  type = "diff"
  address = {{quote .Address}}

{{- if .DaemonSet}}

# The diff service's order stays as it is: where CRI pulls by itself (registry.mirrors and others), "dedup-diff"
# in it would be asked about every image, and no pod could be pulled while the daemon's pod is away.
{{- else}}

# Who unpacks for CRI and nerdctl: whatever is not for dedup goes on to "walking".
[plugins."io.containerd.service.v1.diff-service"]
  default = ["dedup-diff", "walking"]
{{- end}}

# Who unpacks for "ctr image pull". This list replaces the built-in one, so overlayfs is in it.
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
  platform = "linux"
  snapshotter = "overlayfs"
  differ = "walking"

[[plugins."io.containerd.transfer.v1.local".unpack_config]]
  platform = "linux"
  snapshotter = "dedup"
  differ = "dedup-diff"
{{- if .CRI}}

# What the kubelet pulls and runs from now on; running containers stay where they are.
{{- if eq .Version 2}}
[plugins."io.containerd.grpc.v1.cri".containerd]
  snapshotter = "dedup"
{{- else}}
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "dedup"
{{- end}}
{{- end}}
`))

// tomlString quotes s as TOML's basic string.
func tomlString(s string) string {
	var b strings.Builder
	b.WriteByte('"')
	for _, r := range s {
		switch {
		case r == '"' || r == '\\':
			b.WriteByte('\\')
			b.WriteRune(r)
		case r < 0x20 || r == 0x7f:
			fmt.Fprintf(&b, `\u%04X`, r)
		default:
			b.WriteRune(r)
		}
	}
	b.WriteByte('"')
	return b.String()
}
