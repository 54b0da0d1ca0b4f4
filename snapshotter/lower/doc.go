// Package lower makes what lies below a container: chain images, their mounts, and the options of an overlay on them.
//
// A chain image is an EROFS image of the merged trees of a chain of layers. It is a cache: each may go at any time and is
// built again. The probe finds out by trying what the kernel and a file system offer; versions are not compared.
//
// The package knows layers and chains, not snapshots: who uses a chain has an id that means nothing here. It decides
// nothing about what is in service or in use after a restart; whoever opens it tells it with Use.
package lower
