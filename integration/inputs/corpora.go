package inputs

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

// The images that come in after the first one of a corpus.
const (
	First      = "first image"
	Rebuild    = "rebuild"       // the same inputs, at another time
	Upgrade    = "minor upgrade" // some packages in a newer version
	BaseChange = "base change"   // the upgraded application on the next Debian
)

// Version is one image of a corpus.
type Version struct {
	What   string
	Layers []*image.Layer // base first
	// NoStart: its command cannot run.
	NoStart bool
}

// Corpus is one kind of service, in images that follow one another on a node.
type Corpus struct {
	Name     string
	About    string
	Versions []Version
	// Command starts it and prints something.
	Command []string
}

// maker makes the application of a corpus: build says which one (1 first, 2 rebuild, 3 upgrade). It fills the
// directory root.
type maker struct {
	name, about string
	// recipe changes with what make makes; it is in the names of the cached layers.
	recipe string
	// debian are packages in a layer between Debian and the application, "" for no such layer.
	debian  string
	needs   []node.Command
	make    func(ctx context.Context, s *Set, build int, root string) error
	command []string
}

func makers() []maker {
	return []maker{
		{name: "node", about: "a Node.js service: npm packages, and Node.js itself", needs: []node.Command{npm},
			make: makeNode,
			command: []string{"/opt/node/bin/node", "-e",
				"require('/srv/app/node_modules/express'); console.log('ok')"}},
		{name: "java-thin", about: "a Java service: Java from Debian, and the service's jars side by side, as Jib lays " +
			"them out", debian: jre, needs: []node.Command{maven}, make: makeThin,
			command: []string{"/usr/bin/java", "-cp", "/app/libs/*", javaMain}},
		{name: "java-fat", about: "the same Java service as one jar that holds the others, as Spring Boot packs it",
			recipe: "-2", debian: jre, needs: []node.Command{maven}, make: makeFat,
			command: []string{"/usr/bin/java", "-jar", "/app/service.jar"}},
		{name: "binary", about: "one static Go program; a rebuild stamps another version into it", make: makeBinary,
			command: []string{"/usr/local/bin/crane", "version"}},
	}
}

// Corpora are the names of all corpora.
func Corpora() (names []string) {
	for _, m := range makers() {
		names = append(names, m.name)
	}
	return append(names, "debian", "ml")
}

// Corpus makes the images of one corpus, or takes them from the cache.
func (s *Set) Corpus(ctx context.Context, name string) (Corpus, error) {
	switch name {
	case "debian":
		return s.debianCorpus(ctx)
	case "ml":
		return s.mlCorpus(ctx)
	}
	all := makers()
	i := slices.IndexFunc(all, func(m maker) bool { return m.name == name })
	if i < 0 {
		return Corpus{}, fmt.Errorf("no corpus is called %q (%s)", name, strings.Join(Corpora(), ", "))
	}
	m := all[i]
	base, next, err := s.bases(ctx, m.debian)
	if err != nil {
		return Corpus{}, err
	}
	var apps []*image.Layer
	for build := 1; build <= 3; build++ {
		app, err := s.cached(ctx, fmt.Sprintf("corpus-%s%s-%d", m.name, m.recipe, build),
			func(ctx context.Context) (*image.Layer, error) {
				return s.makeApp(ctx, m, build)
			})
		if err != nil {
			return Corpus{}, err
		}
		apps = append(apps, app)
	}
	return Corpus{m.name, m.about, follow(base, next, apps), m.command}, nil
}

// bases are the layers below an application: this Debian's and the next one's, and those of packages, if any.
func (s *Set) bases(ctx context.Context, packages string) (base, next []*image.Layer, err error) {
	newer, err := OpenNewer(s.say)
	if err != nil {
		return nil, nil, err
	}
	if base, err = s.base(ctx, packages); err != nil {
		return nil, nil, err
	}
	next, err = newer.base(ctx, packages)
	return base, next, err
}

func (s *Set) base(ctx context.Context, packages string) ([]*image.Layer, error) {
	debian, err := s.Debian(ctx)
	if err != nil || packages == "" {
		return []*image.Layer{debian}, err
	}
	l, err := s.cached(ctx, "packages-"+digest(packages), func(ctx context.Context) (*image.Layer, error) {
		s.say("installing " + packages + " on Debian " + s.kit.suite)
		return s.withPackages(ctx, aptInstall(packages), func(_, upper string) (*image.Layer, error) {
			return image.FromDir(s.dir, image.LayerOptions{}, upper, image.DirOptions{Map: keepSystemFile})
		})
	})
	return []*image.Layer{debian, l}, err
}

// follow lines up the images of three builds of an application.
func follow(base, next, apps []*image.Layer) []Version {
	on := func(below []*image.Layer, build int) []*image.Layer { return append(slices.Clone(below), apps[build]) }
	return []Version{
		{What: First, Layers: on(base, 0)}, {What: Rebuild, Layers: on(base, 1)}, {What: Upgrade, Layers: on(base, 2)},
		{What: BaseChange, Layers: on(next, 2)},
	}
}

func (s *Set) makeApp(ctx context.Context, m maker, build int) (_ *image.Layer, err error) {
	if err := node.Require(ctx, s.say, m.needs...); err != nil {
		return nil, err
	}
	s.say(fmt.Sprintf("making build %d of %s", build, m.name))
	root, err := os.MkdirTemp(s.dir, "corpus-")
	if err != nil {
		return nil, fmt.Errorf("make a directory: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(root)) }()
	if err := os.Chmod(root, 0o755); err != nil {
		return nil, err
	}
	if err := m.make(ctx, s, build, root); err != nil {
		return nil, err
	}
	return image.FromDir(s.dir, image.LayerOptions{}, root, image.DirOptions{})
}

//go:embed ml.txt
var mlRequirements string

// mlUpgrades are what the upgrade of the machine learning service changes.
const mlUpgrades = "pandas==2.3.3\nscikit-learn==1.6.1\nmatplotlib==3.10.0\npolars==1.17.1\n"

func (s *Set) mlCorpus(ctx context.Context) (Corpus, error) {
	ml, err := open(s.say, kit{"bookworm", "3.11", mlRequirements, "import numpy, scipy, pandas, sklearn, tensorflow"})
	if err != nil {
		return Corpus{}, err
	}
	base, next, err := ml.bases(ctx, "")
	if err != nil {
		return Corpus{}, err
	}
	var apps []*image.Layer
	for n := 1; n <= 2; n++ {
		app, err := ml.App(ctx, n)
		if err != nil {
			return Corpus{}, err
		}
		apps = append(apps, app)
	}
	app, err := ml.cached(ctx, "corpus-ml-3", func(ctx context.Context) (*image.Layer, error) {
		root, err := ml.rootfs(ctx)
		if err != nil {
			return nil, err
		}
		if err := ml.download(ctx, OlderWheels, mlUpgrades); err != nil {
			return nil, err
		}
		packages := upgraded(lines(mlRequirements), lines(mlUpgrades))
		return ml.install(ctx, root, install{name: "app-3", packages: packages, check: ml.kit.imports})
	})
	if err != nil {
		return Corpus{}, err
	}
	versions := follow(base, next, append(apps, app))
	versions[3].NoStart = true // the next Debian's Python does not look for packages of this one's
	return Corpus{"ml", "a machine learning service: tensorflow for CPUs, scipy, pandas, pyarrow and others", versions,
		[]string{"/usr/bin/python3", "-B", "-c", "import numpy; print('ok')"}}, nil
}

// upgraded replaces pins by newer ones of the same packages.
func upgraded(pins, newer []string) (all []string) {
	for _, pin := range pins {
		name, _, _ := strings.Cut(pin, "==")
		if i := slices.IndexFunc(newer, func(n string) bool { return strings.HasPrefix(n, name+"==") }); i >= 0 {
			pin = newer[i]
		}
		all = append(all, pin)
	}
	return all
}

// tools are what the Debian corpus installs on Debian's smallest system.
const tools = "curl git openssh-client vim-tiny less procps iproute2 gnupg unzip"

// debianCorpus is a distribution's own image, each version flattened to one layer, as base images are.
func (s *Set) debianCorpus(ctx context.Context) (Corpus, error) {
	newer, err := OpenNewer(s.say)
	if err != nil {
		return Corpus{}, err
	}
	var versions []Version
	for _, v := range []struct {
		what string
		set  *Set
		apt  string // options of the second run of apt-get
	}{{First, s, ""}, {Rebuild, s, ""}, {Upgrade, s, "-t bookworm-backports"}, {BaseChange, newer, ""}} {
		name := "corpus-debian-" + strings.ReplaceAll(v.what, " ", "-")
		l, err := v.set.cached(ctx, name, func(ctx context.Context) (*image.Layer, error) {
			return v.set.flattened(ctx, v.what, v.apt)
		})
		if err != nil {
			return Corpus{}, err
		}
		versions = append(versions, Version{What: v.what, Layers: []*image.Layer{l}})
	}
	return Corpus{"debian", "Debian with a few tools, each image one layer; the upgrade takes newer versions of some " +
		"from backports", versions,
		[]string{"/usr/bin/git", "--version"}}, nil
}

// flattened installs tools on a root file system and packs all of it.
func (s *Set) flattened(ctx context.Context, what, options string) (*image.Layer, error) {
	s.say("installing Debian packages for the " + what)
	script := aptInstall(tools)
	if options != "" {
		script += "sed -E 's/ bookworm / bookworm-backports /' /etc/apt/sources.list > " +
			"/etc/apt/sources.list.d/backports.list\n" + aptInstall(options+" "+tools)
	}
	return s.withPackages(ctx, script, func(root, _ string) (*image.Layer, error) {
		return image.FromDir(s.dir, image.LayerOptions{}, root, image.DirOptions{Map: keepSystemFile})
	})
}

func aptInstall(args string) string {
	return "apt-get -q update\napt-get -qy install --no-install-recommends " + args + "\n"
}

// withPackages runs a script with apt-get in an overlay over the root file system, and then pack with the overlay's
// root and with its upper directory.
func (s *Set) withPackages(ctx context.Context, script string, pack func(root, upper string) (*image.Layer, error),
) (_ *image.Layer, err error) {
	base, err := s.rootfs(ctx)
	if err != nil {
		return nil, err
	}
	work, err := os.MkdirTemp(s.dir, "debian-")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, node.UnmountBelow(work), os.RemoveAll(work)) }()
	root, upper := filepath.Join(work, "root"), filepath.Join(work, "upper")
	for _, d := range []string{root, upper, filepath.Join(work, "work")} {
		if err := os.Mkdir(d, 0o755); err != nil {
			return nil, err
		}
	}
	opts := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", base, upper, filepath.Join(work, "work"))
	if err := unix.Mount("overlay", root, "overlay", 0, opts); err != nil {
		return nil, fmt.Errorf("mount overlay: %w", err)
	}
	for _, file := range []string{"/etc/resolv.conf", "/etc/hosts"} {
		if data, err := os.ReadFile(file); err == nil {
			if err := os.WriteFile(filepath.Join(root, file), data, 0o644); err != nil {
				return nil, err
			}
		}
	}
	proc := filepath.Join(root, "proc") // Java's package asks for it
	if err := unix.Mount("proc", proc, "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return nil, fmt.Errorf("mount proc: %w", err)
	}
	chroot, err := node.LookPath("chroot")
	if err != nil {
		return nil, err
	}
	env := append(os.Environ(), "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LANG=C.UTF-8")
	script = "set -e; export DEBIAN_FRONTEND=noninteractive\n" + script + "apt-get clean\n"
	if err := run(ctx, env, chroot, root, "/bin/sh", "-c", script); err != nil {
		return nil, fmt.Errorf("install packages: %w", err)
	}
	if err := unix.Unmount(proc, unix.MNT_DETACH); err != nil {
		return nil, fmt.Errorf("unmount proc: %w", err)
	}
	return pack(root, upper)
}
