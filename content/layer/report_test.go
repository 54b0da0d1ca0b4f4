package layer

import (
	"context"
	"errors"
	"os"
	"testing"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

func TestReport(t *testing.T) {
	s := openStore(t, t.TempDir(), content.Python)
	large := string(make([]byte, 10_000))
	tars := [][]byte{
		makeTar(t, member{name: "a", data: large, mtime: 1}),
		makeTar(t, member{name: "a", data: large, mtime: 2, uid: 7}), // equal to the first but for time and owner
		makeTar(t, member{name: "b", data: large, mtime: 1}),
		// another tar of the third
		makeTar(t, member{name: "b", data: large, mtime: 1}, member{name: "b", data: large, mtime: 1}),
	}
	uses := map[content.LayerID]int{}
	for _, b := range tars {
		in, err := s.IngestBlob(t.Context(), blobOf(b))
		if err != nil {
			t.Fatal(err)
		}
		uses[in.Layer]++
	}
	list := s.List()
	if len(list) != 3 || s.Objects() != 1 {
		t.Fatalf("%d layers, %d objects", len(list), s.Objects())
	}
	for i, l := range list {
		facts, err := s.Facts(l.ID)
		if err != nil || l.Holds != uses[l.ID] || len(l.DiffIDs) != uses[l.ID] || l.Bytes != 10_000 ||
			l.Payload != facts.Payload || l.Usage != facts.Usage {
			t.Errorf("%+v, %v", l, err)
		}
		if i > 0 && list[i-1].ID.Hex() >= l.ID.Hex() {
			t.Error("the list is not sorted")
		}
	}
	groups := EqualGroups(list)
	if len(groups) != 1 || len(groups[0]) != 2 {
		t.Fatalf("%+v", groups)
	}
	for _, l := range groups[0] {
		if d := l.DiffIDs[0]; d != diffIDOf(tars[0]) && d != diffIDOf(tars[1]) {
			t.Errorf("%+v is equal to no other layer", l)
		}
	}
}

func TestEqualGroupsLargestFirst(t *testing.T) {
	layer := func(payload byte, bytes int64) Listed {
		return Listed{Facts: Facts{Bytes: bytes, Payload: content.PayloadDigest{Sum: content.Sum{payload}}}}
	}
	groups := EqualGroups([]Listed{layer(3, 5), layer(1, 10), layer(2, 5), layer(1, 10), layer(9, 99), layer(2, 5),
		layer(3, 5)})
	var order []byte
	for _, g := range groups {
		order = append(order, g[0].Payload.Sum[0])
	}
	if string(order) != "\x01\x02\x03" {
		t.Error(order)
	}
}

func TestMeasure(t *testing.T) {
	root := t.TempDir()
	s := openStore(t, root, content.Exact)
	before, err := s.Measure(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	in, err := s.IngestBlob(t.Context(),
		blobOf(makeTar(t, member{name: "a", data: string(make([]byte, 1_000_000)), mtime: 1})))
	if err != nil {
		t.Fatal(err)
	}
	after, err := s.Measure(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if after.Inodes-before.Inodes != 2 || in.Added.Inodes != 2 || after.Bytes-before.Bytes < 1_000_000 ||
		after.Bytes-before.Bytes > 1_100_000 {
		t.Errorf("%+v, then %+v; the ingest says %+v", before, after, in.Added)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Measure(ctx); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if u, err := DiskUsage(t.Context(), root+"/none"); u != (Usage{}) || err != nil {
		t.Error(u, err)
	}
	if err := os.WriteFile(root+"/sparse", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(root+"/sparse", 1<<30); err != nil {
		t.Fatal(err)
	}
	if u, err := DiskUsage(t.Context(), root+"/sparse"); u != (Usage{Inodes: 1}) || err != nil {
		t.Error(u, err)
	}
}
