package integration

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

// pairs is how many files with two names linkedLayer has.
const pairs = 300

// linkedLayer has pairs of names of one file each, and the same number of files with one name.
func linkedLayer(t *testing.T) *image.Layer {
	t.Helper()
	entries := []image.Entry{image.Dir("data"), image.Dir("data/one"), image.Dir("data/two"), image.Dir("data/apart")}
	for i := range pairs {
		name := fmt.Sprint(i)
		entries = append(entries, image.File("data/one/"+name, "linked "+name+strings.Repeat(".", i*7)),
			image.Hardlink("data/two/"+name, "data/one/"+name),
			image.File("data/apart/"+name, "apart "+name+strings.Repeat(".", i*7)))
	}
	return layer(t, entries...)
}

// repositoryLayer has a git repository with a commit, and oldstat.
func repositoryLayer(t *testing.T) *image.Layer {
	t.Helper()
	must(t, node.Require(testContext(t), func(text string) { t.Log(text) }, node.Git))
	root := t.TempDir()
	repo := filepath.Join(root, "repo")
	must(t, os.MkdirAll(filepath.Join(repo, "src/deep"), 0o755))
	for i := range 100 {
		must(t, os.WriteFile(filepath.Join(repo, "src/deep", fmt.Sprint(i)), []byte(strings.Repeat("line\n", i*5)), 0o644))
	}
	config := []string{"-C", repo, "-c", "user.name=a", "-c", "user.email=a@example.com", "-c", "maintenance.auto=0"}
	for _, args := range [][]string{{"init", "-q"}, {"add", "."}, {"commit", "-q", "-m", "first"}} {
		sh(t, "git", append(config[:len(config):len(config)], args...)...)
	}
	cmd := exec.CommandContext(testContext(t), "go", "build", "-o", filepath.Join(root, "oldstat"), "./oldstat")
	cmd.Env = append(os.Environ(), "GOARCH=386", "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build oldstat: %v\n%s", err, out)
	}
	l, err := image.FromDir(t.TempDir(), image.LayerOptions{}, root, image.DirOptions{})
	must(t, err)
	return l
}

// groups prints which names are one file, and what is in it.
const groups = `groups() { python3 - $1 <<E
import os, sys, zlib
files = {}
for top, _, names in os.walk(sys.argv[1]):
    for name in names:
        st = os.lstat(os.path.join(top, name))
        files.setdefault((st.st_dev, st.st_ino), []).append(os.path.relpath(os.path.join(top, name), sys.argv[1]))
for names in sorted(map(sorted, files.values())):
    print(*names, zlib.crc32(open(os.path.join(sys.argv[1], names[0]), "rb").read()))
E
}; groups /data > /tmp/want && test $(wc -l < /tmp/want) = 600 && `

// nodeScript runs JavaScript with the packages of inputs.Programs.
func nodeScript(code string) string {
	return "cd /opt/programs && node -e '" + code + "'"
}

// program is a shell command in a container.
type program struct {
	name, script, want string
	// dedup is what it prints with dedup where that differs, as docs/troubleshooting.md says.
	dedup string
}

// inodePrograms look at inode numbers and devices.
func inodePrograms() []program {
	return []program{
		{name: "Node tells files apart", script: nodeScript(`
			const fs = require("fs"), seen = new Set(), exact = new Set(); let unsafe = 0;
			const walk = d => { for (const e of fs.readdirSync(d, {withFileTypes: true})) {
				const p = d + "/" + e.name, s = fs.lstatSync(p), b = fs.lstatSync(p, {bigint: true});
				seen.add(s.dev + ":" + s.ino); exact.add(b.dev + ":" + b.ino); if (!Number.isSafeInteger(s.ino)) unsafe++;
				if (e.isDirectory()) walk(p); } };
			walk("/usr"); walk("/data"); walk("/etc");
			console.log(seen.size === exact.size && seen.size > 5000, unsafe)`), want: "true 0\n"},
		{name: "node-tar",
			script: groups + nodeScript(`require("tar").create({file: "/tmp/node.tar", cwd: "/data", sync: true}, ["."])`) +
				` && mkdir /tmp/node-tar && tar -xf /tmp/node.tar -C /tmp/node-tar && groups /tmp/node-tar | cmp - /tmp/want && ` +
				`tar -tvf /tmp/node.tar | grep -c "^h"`,
			want: fmt.Sprintln(pairs)},
		{name: "fs-extra", script: nodeScript(`
			const fs = require("fs-extra"); let copied = 0;
			fs.copySync("/data/apart", "/tmp/fs-extra"); fs.copySync("/data/apart", "/tmp/fs-extra");
			for (let i = 0; i < 300; i += 2) { fs.copySync("/data/apart/" + i, "/data/apart/" + (i + 1)); copied++; }
			console.log(copied, fs.readFileSync("/data/apart/299", "utf8").slice(0, 10))`), want: "150 apart 298.\n"},
		{name: "a 32-bit program", script: "/oldstat /usr/share /data /etc/ | wc -l", want: "3\n"},
		{name: "git status",
			script: "cd /repo && export HOME=/tmp && git config --global --add safe.directory /repo && " +
				"git status --porcelain && touch src/deep/7 && git status --porcelain && " +
				"echo more >> src/deep/9 && git status --porcelain && git stash -q && git status --porcelain",
			want: " M src/deep/9\n"},
		{name: "rsync -aH",
			script: groups + "rsync -aH /data/ /tmp/rsync/ && groups /tmp/rsync | cmp - /tmp/want && " +
				"rsync -aHni /data/ /tmp/rsync/",
			want: ""},
		{name: "rsync -x",
			script: "rsync -ax /usr/share/perl5/ /tmp/rsync-x/ && " +
				"diff -r --no-dereference /usr/share/perl5 /tmp/rsync-x && echo same",
			want: "same\n"},
		{name: "cp -a",
			script: groups + "cp -a /data /tmp/cp && groups /tmp/cp | cmp - /tmp/want && " +
				"cp -a /data/apart/. /tmp/cp/two/ && echo done",
			want: "done\n"},
		{name: "cp -x",
			script: "cp -ax /usr/share/perl5 /tmp/cp-x && diff -r --no-dereference /usr/share/perl5 /tmp/cp-x && echo same",
			want:   "same\n"},
		{name: "dpkg --verify", script: "dpkg --verify | grep -v ^missing; true", want: ""},
		{name: "find -xdev",
			script: "test $(find / -xdev -type f | grep -v ^/tmp | wc -l) -gt 5000 && " +
				"test $(find /usr -xdev | wc -l) = $(find /usr | wc -l) && echo same", want: "same\n"},
		{name: "find -samefile",
			script: "find /data -samefile /data/one/7 | sort", want: "/data/one/7\n/data/two/7\n"},
		{name: "tar --one-file-system",
			script: "list() { tar $1 -cf - /usr/share /etc 2>/dev/null | tar -tf - | wc -l; }; " +
				"test $(list --one-file-system) = $(list) && echo same",
			want: "same\n"},
		{name: "mountpoint",
			script: "for d in / /proc /usr /data; do mountpoint -q $d && echo $d; done; true", want: "/\n/proc\n"},
		{name: "du",
			script: "du -s --apparent-size /usr/share/perl5 | cut -f1 > /tmp/du; test $(cat /tmp/du) -gt 100 && echo sum",
			want:   "sum\n"},
		{name: "stat -c %m", script: "stat -c %m /etc/passwd /usr/bin /proc/1", want: "/\n/\n/proc\n"},
		{name: "df", script: "df --output=target /etc/passwd | tail -1", want: "/\n"},
		{name: "mv",
			script: "mkdir /data/three && mv /data/two/* /data/three/ && ls /data/three | wc -l", want: "300\n"},
		{name: "rm --one-file-system", script: "rm -r --one-file-system /usr/share/doc && echo gone", want: "gone\n"},
		{name: "du -x",
			script: "for o in -sx -s; do test $(du $o --apparent-size /usr/bin | cut -f1) -gt 1000 && echo all; done",
			want:   "all\nall\n", dedup: "all\n"},
		{name: "lsattr",
			script: "lsattr /etc/group >/dev/null 2>&1 && echo flags; " +
				"touch /etc/group; lsattr /etc/group >/dev/null && echo flags",
			want: "flags\nflags\n", dedup: "flags\n"},
		{name: "chattr",
			script: "chattr +A /etc/shells 2>/dev/null && echo set; touch /etc/shells; chattr +A /etc/shells && echo set",
			want:   "set\nset\n", dedup: "set\n"},
		{name: "time of birth",
			script: "test $(stat -c %W /etc/fstab) -gt 0 && echo known; stat -c %W /etc | grep -cv ^0",
			want:   "known\n1\n", dedup: "1\n"},
		{name: "cp",
			script: "cp --reflink=auto /etc/issue /tmp/issue && cmp /etc/issue /tmp/issue && echo same",
			want:   "same\n"},
	}
}

// What programs do with inode numbers and devices gives with dedup what it gives with overlayfs, but for the rows
// that say so.
func runPrograms(t *testing.T, n *node.Node, ref string) {
	ctx := testContext(t)
	ids := map[string]string{}
	for _, snapshotter := range []string{"overlayfs", node.Snapshotter} {
		id, err := n.RunDetached(ctx, snapshotter, ref, "sleep", "1000")
		must(t, err)
		ids[snapshotter] = id
	}
	for _, row := range inodePrograms() {
		t.Run(row.name, func(t *testing.T) {
			for snapshotter, id := range ids {
				out, err := n.Exec(ctx, id, "sh", "-c", row.script)
				if err != nil && row.dedup == "" {
					t.Errorf("with %s: %v", snapshotter, err)
				}
				want := row.want
				if snapshotter == node.Snapshotter && row.dedup != "" {
					want = row.dedup
				}
				if diff := cmp.Diff(want, out); diff != "" {
					t.Errorf("with %s (-want +got):\n%s", snapshotter, diff)
				}
			}
		})
	}
}

// A program in a container mounts an overlay over the container's own files, as Docker in Docker and kind do.
func TestOverlayInContainer(t *testing.T) {
	t.Parallel()
	n, r := startDedup(t, node.Options{}), startRegistry(t)
	ref := push(t, r, "nested:1", busybox(t), dataLayer(t))
	script := "mount -t tmpfs t /tmp && mkdir /tmp/u /tmp/w /tmp/m && " +
		"mount -t overlay o -o lowerdir=/data,upperdir=/tmp/u,workdir=/tmp/w /tmp/m && wc -c < /tmp/m/a && " +
		"echo more >> /tmp/m/b && tail -c 5 /tmp/m/b"
	for _, snapshotter := range []string{"overlayfs", node.Snapshotter} {
		pull(t, n, snapshotter, ref)
		out, err := n.RunWith(testContext(t), snapshotter, []string{"--privileged"}, ref, "sh", "-c", script)
		if want := "9000\nmore\n"; err != nil || out != want {
			t.Errorf("with %s: %q, %v; want %q", snapshotter, out, err, want)
		}
	}
}
