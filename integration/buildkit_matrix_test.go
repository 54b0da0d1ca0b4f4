package integration

import (
	"archive/tar"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sync/errgroup"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/inputs"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/registry"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/rootfs"
)

// churn changes files of a Debian in every way that a layer can hold.
const churn = `import os, shutil
os.rename("/usr/bin/env", "/usr/bin/env2"); os.link("/etc/passwd", "/etc/linked"); os.utime("/etc/passwd")
open("/etc/attr", "w").write("x"); os.setxattr("/etc/attr", "user.note", b"kept")
os.setxattr("/etc/attr", "security.capability", bytes.fromhex("0100000200040000000000000000000000000000"))
os.remove("/etc/issue"); shutil.rmtree("/usr/share/doc"); os.mkdir("/usr/share/doc")
open("/usr/share/doc/new", "w").write("n")
shutil.rmtree("/var/lib/dpkg/info"); os.symlink("/etc", "/var/lib/dpkg/info")
os.chmod("/usr/bin/tac", 0o4755); os.chown("/usr/bin/cut", 7, 8); os.mkfifo("/fifo")
os.mknod("/null", 0o20666, os.makedev(1, 3))
f = open("/sparse", "wb"); f.seek(5 << 20); f.write(b"end"); f.close()
`

// buildMatrix is the long form of TestBuildKit.
type buildMatrix struct {
	*testing.T
	n        *node.Node
	r        *registry.Registry
	builders []*node.BuildKit
	since    time.Time
	base     string
}

// BuildKit does with dedup what it does with overlayfs, on a Debian: each pushed layer is equal, entry by entry, where
// the fidelity is exact.
func TestBuildKitMatrix(t *testing.T) {
	needClients(t)
	t.Parallel()
	set, err := inputs.Open(nil)
	must(t, err)
	debian, err := set.Debian(testContext(t))
	must(t, err)
	m := &buildMatrix{T: t, n: startDedup(t, exact), r: startRegistry(t), since: time.Now().Add(-time.Minute)}
	must(t, image.Seed(m.r.Dir(), debian))
	m.base = push(t, m.r, "debian:1", debian)
	for _, snapshotter := range beside {
		m.builders = append(m.builders, startBuildKit(t, m.n, snapshotter))
	}
	for _, row := range []struct {
		name string
		run  func(*buildMatrix)
	}{
		{"ten steps", (*buildMatrix).tenSteps}, {"churn", (*buildMatrix).churn}, {"pip", (*buildMatrix).pip},
		{"caches", (*buildMatrix).caches},
		{"outputs", (*buildMatrix).outputs}, {"three at once", (*buildMatrix).threeAtOnce}, {"prune", (*buildMatrix).prune},
	} {
		t.Run(row.name, func(t *testing.T) {
			inner := *m
			inner.T = t
			row.run(&inner)
		})
	}
}

// build builds and compares, then pulls what dedup has made with both snapshotters, and compares what they show.
func (m *buildMatrix) build(name string, layers int, files map[string]string, flags ...string) []string {
	m.Helper()
	refs := buildAndPush(m.T, m.builders, contextDir(m.T, files), m.r.Ref(name+":1"), flags...)
	if made := sameImages(m.T, m.since, refs...); len(made.Layers) != layers {
		m.Errorf("%s: %d layers, not %d", name, len(made.Layers), layers)
	}
	for _, snapshotter := range beside {
		pull(m.T, m.n, snapshotter, refs[1])
	}
	equal(m.T, dump(m.T, m.n, "overlayfs", refs[1]), dump(m.T, m.n, node.Snapshotter, refs[1]), noRootTime)
	return refs
}

func (m *buildMatrix) tenSteps() {
	var file strings.Builder
	fmt.Fprintf(&file, "FROM %s\n", m.base)
	for i := range 10 {
		fmt.Fprintf(&file, "RUN echo %d > /step%d && cat /etc/debian_version /step* | sha256sum >> /sums\n", i, i)
	}
	m.build("ten", 11, map[string]string{"Dockerfile": file.String()})
}

func (m *buildMatrix) churn() {
	m.build("churn", 5, map[string]string{"churn.py": churn, "copied/a": "a", "copied/b": "b", "Dockerfile": fmt.Sprintf(`
FROM %[1]s AS other
RUN mkdir /made && cp -a /etc /made
FROM %[1]s
RUN --mount=type=bind,source=churn.py,target=/churn.py python3 /churn.py
COPY --link copied /copied
COPY --link --from=other /made /made
RUN rm /fifo /copied/a && mv /made /moved && cat /moved/etc/passwd > /dev/null
`, m.base)})
}

// pip compiles in a temporary directory, whose random name would be in the bytecode.
func (m *buildMatrix) pip() {
	set, err := inputs.Open(nil)
	must(m.T, err)
	wheels, err := set.Wheels(testContext(m.T))
	must(m.T, err)
	m.build("pip", 3, map[string]string{"Dockerfile": fmt.Sprintf(`
FROM %[1]s AS build
RUN --mount=type=bind,from=wheels,target=/mnt python3 /mnt/%[2]s install --quiet --no-index --no-cache-dir --no-deps \
    --break-system-packages --root-user-action ignore --find-links /mnt/wheels --target /app \
    --no-compile django asgiref sqlparse && \
    python3 -m compileall -q /app
FROM %[1]s
COPY --from=build /app /app
RUN PYTHONPATH=/app python3 -c 'import django.db.models; print(django.__version__)' > /version
`, m.base, inputs.Pip)}, "--local", "wheels="+wheels, "--opt", "context:wheels=local:wheels")
}

// caches exports caches of each kind, forgets all, and builds from them.
func (m *buildMatrix) caches() {
	file := fmt.Sprintf("FROM %s\nRUN date +%%N > /one\nRUN date +%%N > /two\n", m.base)
	dir := contextDir(m.T, map[string]string{"Dockerfile": file})
	for i, b := range m.builders {
		local := m.TempDir()
		cached, inline := m.r.Ref("cache:"+beside[i]), m.r.Ref("inline:"+beside[i])
		for _, row := range []struct{ name, to, from string }{
			{"inline", "type=inline", "type=registry,ref=" + inline},
			{"registry", "type=registry,mode=max,ref=" + cached, "type=registry,ref=" + cached},
			{"local", "type=local,mode=max,dest=" + local, "type=local,src=" + local},
		} {
			output := []string{"--output", "type=image,push=true,name=" + inline}
			_, err := b.Build(testContext(m.T), dir, append(output, "--export-cache", row.to)...)
			must(m.T, err)
			first := readImage(m.T, pushed(m.T, inline), m.since)
			_, err = b.Ctl(testContext(m.T), "prune", "--all")
			must(m.T, err)
			progress, err := b.Build(testContext(m.T), dir, append(output, "--import-cache", row.from)...)
			must(m.T, err)
			if n := strings.Count(progress, "CACHED"); n != 2 {
				m.Errorf("%s, %s: %d of 2 steps came from the cache\n%s", beside[i], row.name, n, progress)
			}
			if diff := cmp.Diff(first, readImage(m.T, pushed(m.T, inline), m.since)); diff != "" {
				m.Errorf("%s, %s: what the cache gave (-want +got):\n%s", beside[i], row.name, diff)
			}
			_, err = b.Ctl(testContext(m.T), "prune", "--all")
			must(m.T, err)
		}
	}
}

// outputs exports one build in every form.
func (m *buildMatrix) outputs() {
	file := fmt.Sprintf("FROM %s\nRUN mv /etc/issue /moved && rm -r /usr/share/doc && mkdir /usr/share/doc\n", m.base)
	files := map[string]string{"Dockerfile": file}
	for _, compression := range []string{"gzip", "zstd", "estargz", "uncompressed"} {
		out := ",compression=" + compression + ",force-compression=true,oci-mediatypes=true"
		var refs []string
		for i, b := range m.builders {
			ref := m.r.Ref("outputs-" + compression + ":" + beside[i])
			_, err := b.Build(testContext(m.T), contextDir(m.T, files), "--output", "type=image,push=true,name="+ref+out)
			must(m.T, err)
			refs = append(refs, ref)
		}
		sameImages(m.T, m.since, refs...)
	}
	for _, kind := range []string{"oci", "docker", "tar", "local"} {
		var got [][]string
		for _, b := range m.builders {
			dest := filepath.Join(m.TempDir(), "out")
			_, err := b.Build(testContext(m.T), contextDir(m.T, files), "--output", "type="+kind+",name=x:1,dest="+dest)
			must(m.T, err)
			got = append(got, m.readOutput(kind, dest))
		}
		if diff := cmp.Diff(got[0], got[1]); diff != "" || len(got[0]) == 0 {
			m.Errorf("%s (-overlayfs +dedup), %d entries:\n%s", kind, len(got[0]), diff)
		}
	}
}

// readOutput describes what BuildKit has written: a directory, a tar of one, or an archive of blobs, of which it gives
// the layers.
func (m *buildMatrix) readOutput(kind, dest string) (lines []string) {
	if kind == "local" {
		tree, err := rootfs.Dump(dest)
		must(m.T, err)
		for path, e := range tree {
			line := fmt.Sprintf("%s %s %04o %d:%d %s %s", path, e.Type, e.Mode, e.UID, e.GID, e.SHA256, e.Target)
			lines = append(lines, line)
		}
		return sorted(lines)
	}
	f, err := os.Open(dest)
	must(m.T, err)
	defer f.Close()
	if kind == "tar" {
		lines, err = readEntries(f, m.since)
		must(m.T, err)
		return lines
	}
	for tr := tar.NewReader(f); ; {
		h, err := tr.Next()
		if err == io.EOF {
			return sorted(lines)
		}
		must(m.T, err)
		if zr, err := gunzip(tr); err == nil && strings.HasPrefix(h.Name, "blobs/") {
			entries, err := readEntries(zr, m.since)
			must(m.T, err)
			lines = append(lines, entries...)
		}
	}
}

// threeAtOnce builds three images at one time, which share their first step.
func (m *buildMatrix) threeAtOnce() {
	for i, b := range m.builders {
		var g errgroup.Group
		for j := range 3 {
			dir := contextDir(m.T, map[string]string{"Dockerfile": fmt.Sprintf(
				"FROM %s\nRUN echo shared > /shared\nRUN echo %d > /own && rm /etc/issue && cat /shared >> /own\n", m.base, j)})
			g.Go(func() error {
				out := m.r.Ref(fmt.Sprintf("at-once-%d:%s", j, beside[i]))
				_, err := b.Build(testContext(m.T), dir, "--output", "type=image,push=true,name="+out)
				return err
			})
		}
		must(m.T, g.Wait())
	}
	for j := range 3 {
		var refs []string
		for _, snapshotter := range beside {
			refs = append(refs, m.r.Ref(fmt.Sprintf("at-once-%d:%s", j, snapshotter)))
		}
		sameImages(m.T, m.since, refs...)
	}
}

// prune leaves nothing, and what was pushed runs again from a clean pull.
func (m *buildMatrix) prune() {
	for _, b := range m.builders {
		_, err := b.Ctl(testContext(m.T), "prune", "--all")
		must(m.T, err)
		out, err := b.Ctl(testContext(m.T), "du", "--format", "{{range .}}{{.ID}} {{end}}")
		must(m.T, err)
		if strings.TrimSpace(out) != "" {
			m.Errorf("%s keeps %s", b.Namespace(), out)
		}
	}
	ref := m.r.Ref("churn:1-" + node.Snapshotter)
	for _, snapshotter := range beside {
		pull(m.T, m.n, snapshotter, ref)
		out, err := m.n.Run(testContext(m.T), snapshotter, ref, "python3", "-c",
			// Of extended attributes, differs write capabilities alone.
			"import os; print(os.stat('/sparse').st_size, os.listxattr('/etc/attr'), os.listdir('/usr/share/doc'))")
		must(m.T, err)
		if want := "5242883 ['security.capability'] ['new']\n"; out != want {
			m.Errorf("%s: %q, want %q", snapshotter, out, want)
		}
	}
}
