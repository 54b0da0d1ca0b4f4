package content

import (
	"crypto/sha256"
	"encoding/binary"
	"strings"
)

// A source that has valid bytecode shows a timestamp that follows from its bytes, and its bytecode records that one.
// So builds share both, and Python tells two sources apart wherever their files are copied, moved or linked to.
//
// The range is 1980-01-03 to 2014-01-11: zip, tar and 32-bit times hold it in every time zone, and no clock is behind
// it, so that make and tar see no file from the future. Changing anything here changes object and layer ids, and so is
// a format break.
const (
	sourceTimeFirst = 315_705_600
	sourceTimeBits  = 30
)

// SourceTime returns the timestamp, in seconds since 1970, of a source whose bytes have this sha256.
func SourceTime(source Sum) uint32 {
	return sourceTimeFirst + binary.BigEndian.Uint32(source[:])>>(32-sourceTimeBits)
}

// SourceTime returns the timestamp that follows from the bytes of a Regular.
func (e *Entry) SourceTime() uint32 {
	if e.Object.IsZero() {
		return SourceTime(sha256.Sum256(e.Data))
	}
	return SourceTime(e.Object.Sum)
}

// PycHeaderLen is the length of a CPython bytecode header in bytes (PEP 552).
const PycHeaderLen = 16

// PycHeader is what a timestamp .pyc records of its source.
type PycHeader struct {
	Mtime uint32 // seconds since 1970, truncated to 32 bits
	Size  uint32 // bytes, truncated to 32 bits
}

// CPython writes magic numbers as <number> "\r\n", about 10 to 60 new numbers for
// each minor version: 3390 is the first of 3.7, which introduced this header
// shape; 3.14 ended at 3627. The bound leaves room for a decade of releases and
// keeps out numbers that may come to mean another shape.
const (
	pycMagicMin = 3390
	pycMagicMax = 4500
)

// ParsePyc recognises the header of a timestamp .pyc (PEP 552, flags 0) of a
// known CPython shape. Anything else is an ordinary file.
func ParsePyc(b []byte) (PycHeader, bool) {
	if len(b) < PycHeaderLen {
		return PycHeader{}, false
	}
	magic := binary.LittleEndian.Uint16(b)
	if b[2] != '\r' || b[3] != '\n' || magic < pycMagicMin || magic > pycMagicMax {
		return PycHeader{}, false
	}
	if binary.LittleEndian.Uint32(b[4:]) != 0 {
		return PycHeader{}, false
	}
	return PycHeader{
		Mtime: binary.LittleEndian.Uint32(b[8:]),
		Size:  binary.LittleEndian.Uint32(b[12:]),
	}, true
}

// SetPycTime writes the source timestamp into the header of a timestamp .pyc.
func SetPycTime(b []byte, mtime uint32) { binary.LittleEndian.PutUint32(b[8:12], mtime) }

// PycSource returns the path of the source that a .pyc at path belongs to:
// dir/__pycache__/name.<tag>[.opt-<level>].pyc and the legacy dir/name.pyc
// both belong to dir/name.py (PEP 3147, PEP 488).
func PycSource(path string) (string, bool) {
	stem, ok := strings.CutSuffix(path, ".pyc")
	if !ok {
		return "", false
	}
	dir, name := SplitPath(stem)
	parent, last := SplitPath(dir)
	if last != "__pycache__" {
		if name == "" {
			return "", false
		}
		return stem + ".py", true
	}
	if i := strings.LastIndexByte(name, '.'); i > 0 && strings.HasPrefix(name[i:], ".opt-") {
		name = name[:i]
	}
	// The module name may hold dots of its own; the tag may not.
	i := strings.LastIndexByte(name, '.')
	if i <= 0 {
		return "", false
	}
	name = name[:i] + ".py"
	if parent == "" {
		return name, true
	}
	return parent + "/" + name, true
}
