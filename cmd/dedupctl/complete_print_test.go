package main

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// The output says what came from the store and what from a registry.
func TestCompletionText(t *testing.T) {
	blob := func(name string, n int64) CompletedBlob {
		return CompletedBlob{"sha256:" + strings.Repeat(name, 64), "application/vnd.oci.image.layer.v1.tar+gzip", n}
	}
	var all Completion
	all.add(Completed{Image: "app:1", Made: []CompletedBlob{blob("a", 5_000_000), blob("b", 1_000_000)},
		MadeBytes: 6_000_000, Fetched: []CompletedBlob{blob("c", 2_000)}, FetchedBytes: 2_000, PresentBytes: 700})
	all.add(Completed{Image: "base:1", PresentBytes: 5_000})
	got := text(func(b *strings.Builder) { printCompletion(b, all) })
	want := `
BLOB          SIZE     FROM      TYPE
aaaaaaaaaaaa  5.00 MB  store     application/vnd.oci.image.layer.v1.tar+gzip
bbbbbbbbbbbb  1.00 MB  store     application/vnd.oci.image.layer.v1.tar+gzip
cccccccccccc  2.00 kB  registry  application/vnd.oci.image.layer.v1.tar+gzip

2 blobs of app:1 made from the store, 6.00 MB; 1 fetched, 2.00 kB; 700 B were there.
base:1 is complete: all of its 5.00 kB are there.

2 images, 6.00 MB made from the store, 2.00 kB fetched, 5.70 kB were there.
`
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("want (-), got (+):\n%s", diff)
	}
	if all.Images[1].Made == nil || all.Images[1].Fetched == nil {
		t.Error("JSON has null in place of an empty list")
	}
}

// A trim tells what can be made again.
func TestTrimmedRecipesText(t *testing.T) {
	got := text(func(b *strings.Builder) {
		writeTrimmed(b, Trimmed{FreedBlobs: 3, FreedBytes: 9_000, Images: []TrimmedImage{
			{Namespace: "default", Names: []string{"app:1"}, Layers: 3, Blobs: 3, BlobBytes: 9_000, Recipes: 2}}})
	})
	want := "2 of them can be made again from the store, without a registry: dedupctl complete IMAGE"
	if !strings.Contains(got, want) {
		t.Errorf("%s\nwant %q", got, want)
	}
}
