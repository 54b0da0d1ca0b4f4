package snapshotter

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"math/bits"
)

// A bolt file is pages of one size, in the byte order of the machine:
//
//	page    id u64, flags u16, count u16, overflow u32 (pages that follow and belong to it), elements, their bytes
//	meta    pages 0 and 1: magic u32, version u32, page size u32, flags u32, root bucket, freelist page u64,
//	        number of pages u64, transaction u64, FNV-1a of all that u64; the newer one counts
//	branch  element: pos u32 (from itself), key size u32, page u64; count of them
//	leaf    element: flags u32 (1 for a bucket), pos u32, key size u32, value size u32
//	bucket  root page u64, sequence u64; where root is 0 a leaf page without header follows in the value
//	free    page ids, sorted; where count is 0xffff the first is their number
//
// bbolt maps the file and believes it. What is damaged ends the process in a fault, or in a recursion without end,
// neither of which can be recovered from. So this reads all of it before bbolt does.
const (
	boltMagic    = 0xED0CDAED
	boltVersion  = 2
	boltHeader   = 16
	boltMeta     = 56 // without the checksum
	boltElement  = 16
	boltBucket   = 16
	boltNoFree   = ^uint64(0)
	flagBranch   = 1
	flagLeaf     = 2
	flagMeta     = 4
	flagFreelist = 0x10
)

var order = binary.NativeEndian

// boltFile is a bolt file in memory that is being verified.
type boltFile struct {
	data            []byte
	page            uint64 // bytes of a page
	root, free, end uint64 // pages; end is their number
	txid            uint64
	metas           int    // that are whole
	seen            []bool // pages that something names
}

// checkBolt tells what is wrong with a bolt file's structure. It may be anything. back tells that the file is whole,
// but as it was before its last transaction.
func checkBolt(data []byte) (back bool, err error) {
	f, err := newestMeta(data)
	if err != nil {
		return false, err
	}
	if have := uint64(len(data)) / f.page; have < f.end {
		return false, fmt.Errorf("it ends after %d of %d pages", have, f.end)
	}
	f.seen = make([]bool, f.end)
	f.seen[0], f.seen[1] = true, true
	if _, err := f.tree(f.root, nil, nil); err != nil {
		return false, err
	}
	return f.metas < 2, f.freelist()
}

// newestMeta finds the meta page that counts: one of them may be torn.
func newestMeta(data []byte) (newest boltFile, err error) {
	metas, wrong := 0, error(nil)
	err = errors.New("it is no bolt file, or its first pages are damaged")
	try := func(at uint64) {
		if at+boltHeader+boltMeta+8 > uint64(len(data)) {
			return
		}
		m := data[at+boltHeader:]
		sum := fnv.New64a()
		sum.Write(m[:boltMeta])
		if order.Uint32(m) != boltMagic || order.Uint32(m[4:]) != boltVersion || order.Uint64(m[boltMeta:]) != sum.Sum64() {
			return
		}
		f := boltFile{
			data: data, page: uint64(order.Uint32(m[8:])),
			root: order.Uint64(m[16:]), free: order.Uint64(m[32:]), end: order.Uint64(m[40:]), txid: order.Uint64(m[48:]),
		}
		if at > 0 && at != f.page || f.page < 1024 || bits.OnesCount64(f.page) != 1 || f.end < 3 {
			return
		}
		metas++
		if order.Uint64(data[at:]) != at/f.page || order.Uint16(data[at+8:]) != flagMeta {
			wrong = fmt.Errorf("page %d says that it is another one", at/f.page)
		}
		if newest.data == nil || f.txid > newest.txid {
			newest, err = f, nil
		}
	}
	try(0)
	for page := uint64(1024); page <= 1<<20; page <<= 1 {
		try(page)
	}
	newest.metas = metas
	return newest, errors.Join(err, wrong)
}

// take returns a page with all that belongs to it.
func (f *boltFile) take(id uint64) (flags, count uint16, page []byte, err error) {
	if id < 2 || id >= f.end {
		return 0, 0, nil, fmt.Errorf("page %d of %d is named", id, f.end)
	}
	at := id * f.page
	head := f.data[at:]
	overflow := uint64(order.Uint32(head[12:]))
	if named := order.Uint64(head); named != id {
		return 0, 0, nil, fmt.Errorf("page %d says that it is page %d", id, named)
	}
	if overflow >= f.end-id {
		return 0, 0, nil, fmt.Errorf("page %d goes on for %d pages", id, overflow)
	}
	for i := id; i <= id+overflow; i++ {
		if f.seen[i] {
			return 0, 0, nil, fmt.Errorf("page %d is named twice", i)
		}
		f.seen[i] = true
	}
	return order.Uint16(head[8:]), order.Uint16(head[10:]), f.data[at : at+(overflow+1)*f.page], nil
}

// tree verifies a branch or leaf page and all below it. Keys lie in [low, high); nil is no limit. It returns the last
// key.
func (f *boltFile) tree(id uint64, low, high []byte) (last []byte, err error) {
	flags, count, page, err := f.take(id)
	if err != nil {
		return nil, err
	}
	switch flags {
	case flagLeaf:
		return f.leaf(id, page[boltHeader:], int(count), low, high, false)
	case flagBranch:
		return f.branch(id, page[boltHeader:], int(count), low, high)
	}
	return nil, fmt.Errorf("page %d is of unknown type %#x", id, flags)
}

// slice returns n bytes that lie pos bytes behind the i-th element, and not before the end of all elements.
func slice(body []byte, count, i int, pos, n uint64) ([]byte, bool) {
	start := uint64(i*boltElement) + pos
	if start < uint64(count*boltElement) || start+n > uint64(len(body)) {
		return nil, false
	}
	return body[start : start+n], true
}

func (f *boltFile) branch(id uint64, body []byte, count int, low, high []byte) (last []byte, err error) {
	if count == 0 || count*boltElement > len(body) {
		return nil, fmt.Errorf("branch page %d says that it has %d elements", id, count)
	}
	keys := make([][]byte, count+1)
	for i := range count {
		e := body[i*boltElement:]
		var ok bool
		if keys[i], ok = slice(body, count, i, uint64(order.Uint32(e)), uint64(order.Uint32(e[4:]))); !ok {
			return nil, fmt.Errorf("a key of page %d lies outside of it", id)
		}
	}
	keys[count] = high
	for i := range count {
		if i+1 < count && bytes.Compare(keys[i], keys[i+1]) >= 0 || outside(keys[i], low, high) {
			return nil, fmt.Errorf("keys of page %d are not in order", id)
		}
		if last, err = f.tree(order.Uint64(body[i*boltElement+8:]), keys[i], keys[i+1]); err != nil {
			return nil, err
		}
	}
	return last, nil
}

func outside(key, low, high []byte) bool {
	return bytes.Compare(key, low) < 0 || high != nil && bytes.Compare(key, high) >= 0
}

func (f *boltFile) leaf(id uint64, body []byte, count int, low, high []byte, inline bool) (last []byte, err error) {
	if count*boltElement > len(body) {
		return nil, fmt.Errorf("leaf page %d says that it has %d elements", id, count)
	}
	for i := range count {
		e := body[i*boltElement:]
		flags, pos, ksize, vsize := order.Uint32(e), uint64(order.Uint32(e[4:])), uint64(order.Uint32(e[8:])),
			uint64(order.Uint32(e[12:]))
		both, ok := slice(body, count, i, pos, ksize+vsize)
		if !ok || ksize == 0 || flags > 1 {
			return nil, fmt.Errorf("element %d of page %d lies outside of it, or is of unknown type", i, id)
		}
		key, value := both[:ksize], both[ksize:]
		if i > 0 && bytes.Compare(last, key) >= 0 || outside(key, low, high) {
			return nil, fmt.Errorf("keys of page %d are not in order", id)
		}
		if flags == 1 {
			if inline {
				return nil, fmt.Errorf("a bucket inside of page %d holds another one", id)
			}
			if err := f.bucket(id, value); err != nil {
				return nil, err
			}
		}
		last = key
	}
	return last, nil
}

func (f *boltFile) bucket(id uint64, value []byte) error {
	if len(value) < boltBucket {
		return fmt.Errorf("a bucket of page %d is too short", id)
	}
	root := order.Uint64(value)
	if root != 0 {
		_, err := f.tree(root, nil, nil)
		return err
	}
	page := value[boltBucket:]
	if len(page) < boltHeader || order.Uint64(page) != 0 || order.Uint16(page[8:]) != flagLeaf ||
		order.Uint32(page[12:]) != 0 {
		return fmt.Errorf("a bucket in page %d is damaged", id)
	}
	_, err := f.leaf(id, page[boltHeader:], int(order.Uint16(page[10:])), nil, nil, true)
	return err
}

// freelist verifies the list of free pages, after all others have been seen.
func (f *boltFile) freelist() error {
	if f.free == boltNoFree {
		return nil
	}
	flags, count, page, err := f.take(f.free)
	if err != nil {
		return fmt.Errorf("free pages: %w", err)
	}
	ids, n := page[boltHeader:], uint64(count)
	if n == 0xffff {
		n, ids = order.Uint64(ids), ids[8:]
	}
	if flags != flagFreelist || n > uint64(len(ids))/8 {
		return fmt.Errorf("free pages: page %d does not list them", f.free)
	}
	for i := range n {
		id := order.Uint64(ids[i*8:])
		if id < 2 || id >= f.end || f.seen[id] {
			return fmt.Errorf("free pages: page %d is in use, listed twice, or not there", id)
		}
		f.seen[id] = true
	}
	return nil
}
