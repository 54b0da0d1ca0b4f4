// Package snapshotter implements containerd's snapshots.Snapshotter over kernel
// overlayfs, with layers from package layer and one chain image per chain.
//
// # What a snapshot is here
//
//   - committed: names one layer (label dedup-snapshotter.io/layer). Right after a
//     Commit of a directory that somebody else wrote it is pending instead (label
//     dedup-snapshotter.io/pending): the directory is ingested in the background, and whoever
//     needs the layer waits for that. A step of a build is pending until nothing has lain on it
//     for a while (steps.go).
//   - active: snapshots/<id>/{fs,work} over the parent's chain image, or over the directories of
//     steps above a chain image (label dedup-snapshotter.io/over).
//   - view: what an active one would lie over, alone.
//
// # Extraction
//
// An active snapshot with the label containerd.io/snapshot.ref is there to be filled
// with one layer. If the layer is known it is committed at once and Prepare answers
// ErrAlreadyExists, whereupon containerd adopts it without fetching anything. Otherwise the
// diff service (package apply) ingests the blob and notes the layer with Applied; the
// directory stays empty. A chain image is built once no further layer follows.
//
// # Invariants
//
//   - Every stored label that names a layer (layer, compared) holds one hold in the layer store.
//   - Labels below dedup-snapshotter.io/ are ours: clients can neither set nor clear them.
//   - No lock is held while a directory is ingested or a chain image is built.
//   - The state is on the disk alone: a restart loses nothing, and unmounts nothing.
package snapshotter
