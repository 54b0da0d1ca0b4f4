package main

import (
	"encoding/json"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"

	dedupv1 "github.com/dedup-snapshotter/dedup-snapshotter/proto/dedup/v1"
)

func TestNumbers(t *testing.T) {
	for _, row := range []struct{ got, want string }{
		{size(0), "0 B"}, {size(999), "999 B"}, {size(1000), "1.00 kB"}, {size(9994), "9.99 kB"},
		{size(9996), "10.0 kB"}, {size(99_960), "100 kB"}, {size(999_499), "999 kB"}, {size(999_500), "1.00 MB"},
		{size(1_234_567_890), "1.23 GB"}, {size(1 << 62), "4.61 EB"},
		{count(0), "0"}, {count(999), "999"}, {count(1000), "1,000"}, {count(-1234567), "-1,234,567"}, {count(-123), "-123"},
		{plural(1, "entry", "entries"), "1 entry"}, {plural(2000, "entry", "entries"), "2,000 entries"},
		{percent(1, 0), "-"}, {percent(1, 4), "25 %"},
		{ratio(10, 4), "2.5x"}, {ratio(3, 10), "0.30x"}, {ratio(10, 0), "-"}, {ratio(0, 4096), "-"},
		{short("sha256:" + strings.Repeat("ab", 32)), "abababababab"}, {short("ab"), "ab"}, {short(""), ""},
		{diffIDs(nil), "-"}, {diffIDs([]string{"sha256:0123456789abcdef", "x", "y"}), "0123456789ab +2"},
	} {
		if row.got != row.want {
			t.Errorf("got %q, want %q", row.got, row.want)
		}
	}
}

func testStatus() Status {
	return Status{
		Version: "v0.1.0", Root: "/var/lib/containerd-dedup-grpc", Fidelity: "python", Reuse: "known",
		Layers: 14, Objects: 48_211, DiffIDs: 17, Uses: 40, LogicalBytes: 9_870_000_000, LogicalEntries: 611_000,
		StoredBytes: 1_410_000_000, StoredInodes: 48_900, FreeBytes: 40_000_000_000, TotalBytes: 100_000_000_000,
		FreeInodes: 6_000_000, TotalInodes: 6_500_000, ChainImages: 9, ChainMounts: 4, Verity: "on",
	}
}

func testLayer(name string, bytes int64) *dedupv1.Layer {
	return &dedupv1.Layer{
		Id: strings.Repeat(name, 64), PayloadDigest: "sha256:" + strings.Repeat("e", 64), Fidelity: "python",
		DiffIds: []string{"sha256:" + strings.Repeat(name, 64)}, Entries: 25_000, LogicalBytes: bytes, AddedBytes: bytes / 10,
		AddedInodes: 800, Uses: 3,
	}
}

func text(write func(*strings.Builder)) string {
	var b strings.Builder
	write(&b)
	return "\n" + b.String()
}

func TestText(t *testing.T) {
	equal := &dedupv1.EqualResponse{Groups: []*dedupv1.EqualGroup{{
		PayloadDigest: "sha256:" + strings.Repeat("e", 64), Entries: 25_000, LogicalBytes: 412_000_000,
		Layers: []*dedupv1.Layer{testLayer("a", 412_000_000), testLayer("b", 412_000_000)},
	}}}
	rows := &dedupv1.DuplicatesResponse{
		Paths: []*dedupv1.DuplicateRow{
			{Name: "/usr/lib/python3/dist-packages", UsedFiles: 60_000, UsedBytes: 900_000_000, Objects: 10_000,
				StoredBytes: 100_000_000},
			{Name: "/opt/evil\x1b[2J\tname", UsedFiles: 2, UsedBytes: 2000, Objects: 1, StoredBytes: 1000},
			{Name: "/opt/once", UsedFiles: 1, UsedBytes: 1000, Objects: 1, StoredBytes: 1000},
		},
		Packages: []*dedupv1.DuplicateRow{{Name: "numpy (pip)", UsedFiles: 4000, UsedBytes: 80_000_000, Objects: 1000,
			StoredBytes: 20_000_000}},
	}
	for _, row := range []struct{ name, got, want string }{
		{"status", text(func(b *strings.Builder) { writeStatus(b, testStatus()) }), `
daemon        v0.1.0, fidelity python, reuse known
root          /var/lib/containerd-dedup-grpc
layers        14 for 17 diffIDs, used 40 times by snapshots
objects       48,211
logical       9.87 GB, 611,000 entries
stored        1.41 GB, 48,900 inodes
dedup ratio   7.0x in bytes, 12.5x in inodes
free          40.0 GB of 100 GB (40 %)
free inodes   6,000,000 of 6,500,000 (92 %)
fs-verity     on
chain images  9, 4 mounted
`},
		{"layers, largest first", text(func(b *strings.Builder) {
			writeLayers(b, layersOf([]*dedupv1.Layer{testLayer("a", 1000), testLayer("b", 412_000_000)}))
		}), `
LAYER         PAYLOAD       DIFFID        FIDELITY  ENTRIES  SIZE     ADDED    INODES  USES
bbbbbbbbbbbb  eeeeeeeeeeee  bbbbbbbbbbbb  python    25,000   412 MB   41.2 MB  800     3
aaaaaaaaaaaa  eeeeeeeeeeee  aaaaaaaaaaaa  python    25,000   1.00 kB  100 B    800     3

2 layers, 412 MB; storing them added 41.2 MB and 1,600 inodes
`},
		{"images, what frees most first", text(func(b *strings.Builder) {
			writeImages(b, imagesOf([]*dedupv1.Image{
				{Namespace: "default", Names: []string{"app:1"}, LogicalBytes: 1_200_000_000, StoredBytes: 900_000_000,
					ExclusiveBytes: 300_000_000, Users: 2},
				{Namespace: "k8s.io", Names: []string{"docker.io/app@sha256:1", "docker.io/app:1", "sha256:2"},
					LogicalBytes: 300, StoredBytes: 2000, ExclusiveBytes: 500, FreedBytes: 500, FreedInodes: 3, FreedBlobBytes: 800},
			}))
		}), `
NAMESPACE  IMAGE                 SIZE     STORED   SHARED   EXCLUSIVE  FREES  INODES  BLOBS  USED BY
k8s.io     docker.io/app:1 (+2)  300 B    2.00 kB  1.50 kB  500 B      500 B  3       800 B  -
default    app:1                 1.20 GB  900 MB   600 MB   300 MB     0 B    0       0 B    2 containers

2 images with 1.20 GB of files
`},
		{"duplicates", text(func(b *strings.Builder) { writeDuplicates(b, duplicatesOf(testStatus(), equal, rows)) }), `
used         9.87 GB, 611,000 entries  every layer as often as snapshots use it: 40 uses of 14 layers
stored       1.41 GB, 48,900 inodes    48,211 objects, trees and chain images
dedup ratio  7.0x                      8.46 GB saved

DIRECTORY                       FILES   USED     OBJECTS  STORED   SAVED
/usr/lib/python3/dist-packages  60,000  900 MB   10,000   100 MB   800 MB
/opt/evil\x1b[2J\tname          2       2.00 kB  1        1.00 kB  1.00 kB

PACKAGE      FILES  USED     OBJECTS  STORED   SAVED
numpy (pip)  4,000  80.0 MB  1,000    20.0 MB  60.0 MB

Layers equal but for mtime, uid and gid:
PAYLOAD       LAYER         DIFFID        ENTRIES  SIZE    ADDED    INODES  USES
eeeeeeeeeeee  aaaaaaaaaaaa  aaaaaaaaaaaa  25,000   412 MB  41.2 MB  800     3
              bbbbbbbbbbbb  bbbbbbbbbbbb  25,000   412 MB  41.2 MB  800     3
`},
	} {
		t.Run(row.name, func(t *testing.T) {
			if d := cmp.Diff(row.want, row.got); d != "" {
				t.Error(d)
			}
		})
	}
}

// Everything that the API tells is in the JSON, under the same name.
func TestJSONIsComplete(t *testing.T) {
	for _, row := range []struct {
		message proto.Message
		view    any
	}{
		{&dedupv1.StatusResponse{}, Status{}},
		{&dedupv1.Layer{}, Layer{}},
		{&dedupv1.EqualGroup{}, EqualGroup{}},
		{&dedupv1.Image{}, Image{}},
		{&dedupv1.DuplicateRow{}, DuplicateRow{}},
	} {
		var want, got []string
		fields := row.message.ProtoReflect().Descriptor().Fields()
		for i := range fields.Len() {
			want = append(want, string(fields.Get(i).Name()))
		}
		typ := reflect.TypeOf(row.view)
		for i := range typ.NumField() {
			got = append(got, typ.Field(i).Tag.Get("json"))
		}
		slices.Sort(want)
		slices.Sort(got)
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("%T: %s", row.view, d)
		}
	}
}

// An empty list is [] in JSON, for whoever loops over it.
func TestJSONOfNothing(t *testing.T) {
	b, err := json.Marshal([]any{layersOf(nil), duplicatesOf(Status{}, nil, nil), imagesOf(nil),
		imagesOf([]*dedupv1.Image{{}}), layersOf([]*dedupv1.Layer{{}})})
	if err != nil || strings.Contains(string(b), "null") {
		t.Errorf("%s, %v", b, err)
	}
}

func TestFullDisk(t *testing.T) {
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Skip(err)
	}
	defer full.Close()
	var stderr strings.Builder
	for _, flag := range []string{"--json=false", "--json"} {
		args := []string{"dedupctl", flag, "config", "containerd", "--containerd-version", "2.1"}
		if code := run(t.Context(), args, full, &stderr); code != exitFailure {
			t.Errorf("%s: exit code %d", flag, code)
		}
	}
	if !strings.Contains(stderr.String(), "no space left") {
		t.Error(stderr.String())
	}
}

// docker save says nothing of layers that are not there: trim does.
func TestTrimWarnsOfDockerSave(t *testing.T) {
	for _, row := range []struct {
		image TrimmedImage
		want  bool
	}{
		{TrimmedImage{Namespace: "moby", BlobBytes: 5}, true},
		{TrimmedImage{Namespace: "moby", KeptBytes: 5, Kept: "a lease holds it"}, false},
		{TrimmedImage{Namespace: "k8s.io", BlobBytes: 5}, false},
	} {
		got := text(func(b *strings.Builder) { writeTrimmed(b, Trimmed{Images: []TrimmedImage{row.image}}) })
		if strings.Contains(got, "docker save") != row.want {
			t.Errorf("%+v: %s", row.image, got)
		}
	}
}
