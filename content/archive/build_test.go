package archive

import (
	"archive/tar"
	"bytes"
	"encoding/binary"
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"
)

// member is one tar member to write.
type member struct {
	hdr  tar.Header
	body string
}

// edit changes a member's header.
type edit func(*tar.Header)

func newMember(typeflag byte, name, link, body string, mode int64, edits []edit) member {
	m := member{body: body, hdr: tar.Header{
		Typeflag: typeflag, Name: name, Linkname: link, Size: int64(len(body)), Mode: mode,
		Uid: 1000, Gid: 100, ModTime: time.Unix(1700000000, 123456789), Format: tar.FormatPAX,
	}}
	for _, edit := range edits {
		edit(&m.hdr)
	}
	return m
}

func file(name, body string, edits ...edit) member {
	return newMember(tar.TypeReg, name, "", body, 0o644, edits)
}
func dir(name string, edits ...edit) member {
	return newMember(tar.TypeDir, name, "", "", 0o755, edits)
}
func symlink(name, target string, edits ...edit) member {
	return newMember(tar.TypeSymlink, name, target, "", 0o777, edits)
}
func link(name, target string, edits ...edit) member {
	return newMember(tar.TypeLink, name, target, "", 0o644, edits)
}
func special(typeflag byte, name string, major, minor int64) member {
	return newMember(typeflag, name, "", "", 0o660, []edit{func(h *tar.Header) { h.Devmajor, h.Devminor = major, minor }})
}

func mode(m int64) edit        { return func(h *tar.Header) { h.Mode = m } }
func owner(uid, gid int) edit  { return func(h *tar.Header) { h.Uid, h.Gid = uid, gid } }
func mtime(sec, ns int64) edit { return func(h *tar.Header) { h.ModTime = time.Unix(sec, ns) } }
func format(f tar.Format) edit {
	return func(h *tar.Header) { h.Format = f; h.ModTime = time.Unix(h.ModTime.Unix(), 0) }
}
func xattr(name, v string) edit {
	return func(h *tar.Header) {
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords[paxXattrPrefix+name] = v
	}
}

// writeTar writes the members as a tar. What archive/tar refuses to write is
// written by rawTar.
func writeTar(t testing.TB, members ...member) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, m := range members {
		if err := w.WriteHeader(&m.hdr); err != nil {
			t.Fatalf("write %q: %v", m.hdr.Name, err)
		}
		if _, err := w.Write([]byte(m.body)); err != nil {
			t.Fatalf("write %q: %v", m.hdr.Name, err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// raw is one header block and its data, to the letter.
type raw struct {
	name     string
	typeflag byte
	link     string
	size     int64
	mode     int64
	gnu      bool
	patch    func(block []byte) // before the checksum
	data     string
}

func rawTar(raws ...raw) []byte {
	var buf bytes.Buffer
	for _, r := range raws {
		b := make([]byte, 512)
		copy(b[0:100], r.name)
		copy(b[100:], fmt.Sprintf("%07o", r.mode))
		copy(b[108:], "0001750\x00")
		copy(b[116:], "0000144\x00")
		copy(b[124:], fmt.Sprintf("%011o", r.size))
		copy(b[136:], fmt.Sprintf("%011o", 1700000000))
		b[156] = r.typeflag
		copy(b[157:257], r.link)
		if r.gnu {
			copy(b[257:], "ustar  \x00")
		} else {
			copy(b[257:], "ustar\x0000")
		}
		if r.patch != nil {
			r.patch(b)
		}
		copy(b[148:156], "        ")
		sum := 0
		for _, c := range b {
			sum += int(c)
		}
		copy(b[148:], fmt.Sprintf("%06o\x00 ", sum))
		buf.Write(b)
		buf.WriteString(r.data)
		buf.Write(make([]byte, -len(r.data)&511))
	}
	buf.Write(make([]byte, 1024))
	return buf.Bytes()
}

// pax is a raw extended header with the given keys and values.
func pax(kv ...string) raw {
	var body strings.Builder
	for i := 0; i < len(kv); i += 2 {
		rest := " " + kv[i] + "=" + kv[i+1] + "\n"
		n := len(rest)
		for len(strconv.Itoa(n))+len(rest) != n {
			n = len(strconv.Itoa(n)) + len(rest)
		}
		body.WriteString(strconv.Itoa(n) + rest)
	}
	return raw{name: "PaxHeaders/x", typeflag: 'x', size: int64(body.Len()), mode: 0o644, data: body.String()}
}

// acl encodes a POSIX ACL of {tag, perm, id} entries.
func acl(entries ...[3]uint32) string {
	v := binary.LittleEndian.AppendUint32(nil, aclVersion)
	for _, e := range entries {
		v = binary.LittleEndian.AppendUint16(v, uint16(e[0]))
		v = binary.LittleEndian.AppendUint16(v, uint16(e[1]))
		v = binary.LittleEndian.AppendUint32(v, e[2])
	}
	return string(v)
}

// capability encodes a security.capability value.
func capability(magic uint32, words ...uint32) string {
	v := binary.LittleEndian.AppendUint32(nil, magic)
	for _, w := range words {
		v = binary.LittleEndian.AppendUint32(v, w)
	}
	return string(v)
}

var (
	fullACL = acl([3]uint32{aclUserObj, 7, 5}, [3]uint32{aclUser, 6, 1234}, [3]uint32{aclGroupObj, 5, 7},
		[3]uint32{aclGroup, 4, 99}, [3]uint32{aclMask, 7, aclNoID}, [3]uint32{aclOther, 4, 0})
	baseACL = acl([3]uint32{aclUserObj, 7, aclNoID}, [3]uint32{aclGroupObj, 5, aclNoID}, [3]uint32{aclOther, 5, aclNoID})
	maskACL = acl([3]uint32{aclUserObj, 7, aclNoID}, [3]uint32{aclGroupObj, 5, aclNoID},
		[3]uint32{aclMask, 1, aclNoID}, [3]uint32{aclOther, 5, aclNoID})
	netRaw = capability(0x02000001, 1<<13, 0, 0, 0)
)
