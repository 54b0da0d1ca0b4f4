package layer

import (
	"fmt"
	"testing"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// A layer that has come in and waits for its snapshot is no part of what others are said to use: its own snapshot will
// claim it, and a client that has asked before would count it twice.
func TestFreshLayersAreNotShared(t *testing.T) {
	s := openStore(t, t.TempDir(), content.Python)
	first := ingest(t, s, makeTar(t, member{name: "first", data: big("first")}))
	s.Claim(first.Layer, Usage{})
	alone := s.Share(first.Layer, true, Usage{})
	second := ingest(t, s, makeTar(t, member{name: "second", data: big("second")}))
	if with := s.Share(first.Layer, true, Usage{}); with != alone {
		t.Errorf("%+v, and %+v while another layer waits for its snapshot", alone, with)
	}
	s.Claim(second.Layer, Usage{})
	expectSum(t, s, first, second)
}

// Merging packs gives back space that snapshots have claimed. Together they never use more than there is.
func TestClaimsShrinkWithPacks(t *testing.T) {
	s := openStore(t, t.TempDir(), content.Python)
	var all []Ingested
	for i := range 20 {
		in := ingest(t, s, makeTar(t, member{name: "f", data: big(fmt.Sprint("small ", i))}))
		s.Claim(in.Layer, Usage{})
		all = append(all, in)
	}
	before := s.Used()
	if err := s.Compact(t.Context()); err != nil {
		t.Fatal(err)
	}
	if after := s.Used(); after.Bytes >= before.Bytes || after.Inodes >= before.Inodes {
		t.Fatalf("merging took %+v to %+v", before, after)
	}
	expectSum(t, s, all...)
}

// expectSum checks that what layers are said to use adds up to what the store uses.
func expectSum(t *testing.T, s *Store, layers ...Ingested) {
	t.Helper()
	var sum Usage
	for _, in := range layers {
		u := s.Share(in.Layer, true, Usage{})
		sum.Bytes, sum.Inodes = sum.Bytes+u.Bytes, sum.Inodes+u.Inodes
	}
	used := s.Used()
	// Each share is rounded by itself.
	n := int64(len(layers))
	if d := sum.Bytes - used.Bytes; d < -n || d > n {
		t.Errorf("layers use %d bytes, the store %d", sum.Bytes, used.Bytes)
	}
	if d := sum.Inodes - used.Inodes; d < -n || d > n {
		t.Errorf("layers use %d inodes, the store %d", sum.Inodes, used.Inodes)
	}
}
