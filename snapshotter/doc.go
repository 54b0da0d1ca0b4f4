// Package snapshotter is containerd's snapshots.Snapshotter over kernel overlayfs,
// chain images and the layer store.
//
// # What a container mounts
//
//	overlay( upperdir=<root>/snapshots/<id>/fs, lowerdir=<chain mount>::<root>/objects )
//
// One metadata layer, whatever the depth of the image, and one data-only layer. No
// process of ours is in the read path: a mounted snapshot outlives the daemon.
//
// # Life of a snapshot
//
//   - An active snapshot has a directory. One for extraction (containerd
//     wants to unpack a layer into it) may instead get a layer, from Applied; its
//     directory then stays empty.
//   - A committed snapshot names one layer, or is pending: what somebody wrote into its
//     directory has not been ingested yet. That happens in the background, or in the
//     first call that needs the layer.
//   - A hit is a snapshot that is committed inside Prepare, because the store
//     knows the layer that was to be unpacked.
//
// # Private labels
//
// Facts of our own are labels under "dedup-snapshotter.io/" of the stored snapshot.
// They never leave this package and no client can set them: see labels.go.
//
// # Invariants
//
//   - The metadata database names every layer that is in use, once per hold: a
//     layer's hold is given back after the transaction that forgot the layer.
//   - A chain image is a cache. It may vanish at any time.
//   - A chain stays mounted while a snapshot exists whose mounts name it.
//
// # Locks
//
// writeMu serialises write transactions with the changes of the in-memory index that
// belong to them. A chain has a lock of its own in chains, for building, mounting and
// unmounting it. The mutexes of index, chains, ingests and builder guard maps, and no I/O
// happens under them. Neither ingests nor builds run under writeMu.
//
// # On disk
//
//	<root>/
//	  lock                 flock: one daemon per root
//	  format               layout version, checked at start
//	  metadata.db          containerd's storage.MetaStore
//	  chains/<hex>.erofs   chain images
//	  snapshots/<id>/fs    upper directory of an active or pending snapshot
//	  snapshots/<id>/work  its overlayfs work directory
//	<run>/
//	  chains/<hex>         mount points of chain images
//	  views/<id>           merged views, only while a pending snapshot is ingested
//
// Everything else below root belongs to content/layer.
package snapshotter
