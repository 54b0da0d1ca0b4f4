package object

import (
	"crypto/sha256"
	"encoding/binary"
	"testing"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

func benchStore(b *testing.B) *Store {
	b.Helper()
	s, err := Open(b.TempDir(), Options{})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := s.Close(); err != nil {
			b.Error(err)
		}
	})
	return s
}

func benchID(n int) content.ObjectID {
	return content.ObjectID{Sum: sha256.Sum256(binary.LittleEndian.AppendUint64(nil, uint64(n)))}
}

// BenchmarkPutKnown looks an object up among 100,000: what every file of a rebuilt layer costs.
func BenchmarkPutKnown(b *testing.B) {
	s := benchStore(b)
	const count = 100_000
	ids := make([]content.ObjectID, count)
	for i := range ids {
		ids[i] = benchID(i)
	}
	s.Load(ids)
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		if added, err := s.Put(ids[i%count], nil); err != nil || added != 0 {
			b.Fatalf("added %d bytes, %v", added, err)
		}
	}
}

// BenchmarkPutNew creates objects of 4 KiB.
func BenchmarkPutNew(b *testing.B) {
	s, data := benchStore(b), make([]byte, 4096)
	b.SetBytes(int64(len(data)))
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		if _, err := s.Put(benchID(i), data); err != nil {
			b.Fatal(err)
		}
	}
}
