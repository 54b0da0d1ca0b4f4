package archive

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"
)

// TestRandomEqualsContainerd applies random tars with the reference, too. Tars that
// the reference refuses are counted, not compared: it has no hardlinks to lower
// layers, and stumbles over directories that are gone at its end.
func TestRandomEqualsContainerd(t *testing.T) {
	const rounds = 400
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	compared := 0
	for i := range rounds {
		g := &generator{Rand: rand.New(rand.NewPCG(seed, uint64(i))), wild: i%2 == 0}
		data := g.tar(t)
		want, refErr := applyReference(t, data)
		got, err := ReadTar(t.Context(), bytes.NewReader(data), hashing{}, nil)
		if err != nil && (refErr == nil || !errors.Is(err, ErrInvalid)) {
			t.Fatalf("round %d: %v; the reference says: %v\n%s", i, err, refErr, g.log.String())
		}
		if err != nil || refErr != nil {
			continue
		}
		checkEntries(t, got)
		compared++
		if diff := diffReference(got, want); diff != "" {
			t.Fatalf("round %d: reference (-), ReadTar (+):\n%s\n%s", i, diff, g.log.String())
		}
	}
	t.Logf("compared %d of %d", compared, rounds)
	if compared < rounds/5 {
		t.Error("the generator makes too many tars that cannot be compared")
	}
}

// generator makes tars of few names, so that members meet. A wild one lets any
// name be anything, but has one mtime for all: the applier sets the time of every
// directory member again at its end, on whatever is there by then.
type generator struct {
	*rand.Rand
	wild bool
	log  strings.Builder
	made []string
}

func (g *generator) tar(t *testing.T) []byte {
	members := make([]member, 0, 16)
	for i := range 1 + g.IntN(16) {
		m := g.member(i)
		fmt.Fprintf(&g.log, "%c %q %q %o\n", m.hdr.Typeflag, m.hdr.Name, m.hdr.Linkname, m.hdr.Mode)
		members = append(members, m)
	}
	return writeTar(t, members...)
}

func (g *generator) member(i int) member {
	edits := []edit{mode(int64(g.IntN(0o1000) | g.IntN(2)<<11 | g.IntN(2)<<9)), owner(g.IntN(3), g.IntN(3))}
	if !g.wild {
		edits = append(edits, mtime(int64(g.IntN(2e9)-1e8), int64(g.IntN(1e9))))
	}
	path := g.path()
	var m member
	switch g.IntN(11) {
	case 0:
		m = file(g.dir()+fmt.Sprintf(".wh.gone%d", i), "", edits...)
	case 1:
		m = file(g.dir()+".wh..wh..opq", "", edits...)
	case 2:
		m = symlink(g.dir()+g.name("s"), "", edits...)
		m.hdr.Linkname = g.symlinkTarget(m.hdr.Name)
	case 3, 4:
		m = link(path, g.earlier(), append(edits, g.xattrs()...)...)
	case 5:
		m = special([]byte{tar.TypeChar, tar.TypeBlock, tar.TypeFifo}[g.IntN(3)], path, int64(g.IntN(2)), int64(g.IntN(2)))
		if !g.wild {
			m.hdr.ModTime = time.Unix(int64(g.IntN(2e9)), 0)
		}
	case 6, 7:
		m = dir(g.dir()+g.name("d"), append(edits, g.xattrs()...)...)
		m.hdr.Mode &^= 0o2000
	default:
		m = file(path, strings.Repeat("x", g.IntN(3)), append(edits, g.xattrs()...)...)
	}
	g.made = append(g.made, m.hdr.Name)
	return m
}

// name is one of three of a class, or, in a wild tar, sometimes of any class.
func (g *generator) name(class string) string {
	if g.wild && g.IntN(4) == 0 {
		class = []string{"d", "f", "s"}[g.IntN(3)]
	}
	return class + string(rune('0'+g.IntN(3)))
}

func (g *generator) dir() string {
	dir := []string{"", "./", "/", "d0/../"}[g.IntN(4)]
	for range g.IntN(4) {
		dir += g.name([]string{"d", "d", "s"}[g.IntN(3)]) + "/"
	}
	return dir
}

func (g *generator) path() string { return g.dir() + g.name("f") }

func (g *generator) earlier() string {
	if len(g.made) == 0 || g.IntN(10) == 0 {
		return g.path()
	}
	return g.made[g.IntN(len(g.made))]
}

// symlinkTarget is a directory. In a tar that is not wild, a name's target never
// changes and leads to no other symlink. None has "x/..": continuity follows x or
// not, by where the link stands and how the member's name is written; we always do.
func (g *generator) symlinkTarget(name string) string {
	last := name[len(name)-1:]
	if !g.wild {
		return "/d" + last
	}
	return []string{"/d" + last, "d" + last, "/s0/d1", "./d1", "/d0/d1/", "/d2/s1"}[g.IntN(6)]
}

func (g *generator) xattrs() []edit {
	var edits []edit
	for _, x := range [][2]string{
		{"user.a", "1"}, {"user.a", "2"}, {"user.b", "3"}, {"security.capability", netRaw}, {"trusted.x", "1"},
		{"system.posix_acl_access", fullACL}, {"system.posix_acl_access", baseACL}, {"system.posix_acl_access", maskACL},
	} {
		if g.IntN(8) == 0 {
			edits = append(edits, xattr(x[0], x[1]))
		}
	}
	return edits
}
