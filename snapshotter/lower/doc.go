// Package lower makes what lies below a container: chain images, their mounts and those of packs, and the options of
// an overlay on them.
//
// # Words
//
//   - chain image: an EROFS image of the merged trees of a chain of layers, whose files' bytes lie in packs. A cache:
//     each may go at any time and is built again.
//   - shared: an image that also tells overlayfs where a payload lies in a mounted pack, so that equal files of all
//     images are one inode, and in memory once. private: one that does not; it works wherever EROFS images over
//     several devices do.
//   - user: an id, which means nothing here, of a snapshot that may be mounted over a chain.
//
// # Invariants
//
//   - An image's file holds the packs that it names (object.Packs.Hold): they stay on the disk as long as it
//     does.
//   - Nothing is mounted over a pack that is not the one that the image was built for.
//   - A mounted image, and the mounts of packs that it was mounted over, stay while the chain has users.
//   - No lock is held while an image is built, but the chain's own.
//
// The probe finds out by trying what the kernel and a file system offer; versions are not compared. One function says
// what an overlay's options look like (Kernel.Overlay). The package decides nothing about what is in service or in
// use after a restart; whoever opens it tells it with Use.
package lower
