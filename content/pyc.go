package content

import (
	"encoding/binary"
	"strings"
)

// PycTime is the canonical timestamp of CPython pairs, in seconds since 1970:
// 2001-03-07T06:57:41Z, a moment that no known tool stamps files with (unlike the
// zip epoch or 0), so that no source can match it by accident. Changing it
// changes object and layer ids, and so is a format break.
const PycTime = 983948261

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
