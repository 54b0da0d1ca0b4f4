// Package content holds the ids and types that everything below it speaks of.
//
// # The flow, one way
//
//	blob --decompress--> tar --archive--> entries --layer--> tree   (layers/)
//	          |                              \-- payloads --> objects (packs/)
//	          \--sha256--> diffID
//	trees of a chain --tree.Merge--> nodes --erofs--> chain image (chains/)
//
// # Words
//
//   - blob: a compressed layer as the registry serves it.
//   - diffID: sha256 of the uncompressed layer tar.
//   - chainID: OCI's identity of a stack of diffIDs.
//   - entry: one normalised tar member.
//   - object: the bytes of one regular file, stored once, named by their sha256.
//   - pack: a file that holds the payloads of one ingest, or of a merge of packs.
//   - tree: the sorted entries of one layer, whiteouts included.
//   - layer: a tree plus the objects it names; named by the sha256 of its canonical encoding.
//   - payload digest: sha256 of the canonical tree without mtime, uid and gid.
//   - chain image: one read-only EROFS image with the merged metadata of a chain, which points into packs.
//   - ingest: turning a tar or a directory into a layer.
//
// # Invariants
//
//   - A layer is visible only when its tree and all objects it names are durable.
//   - A pack is never changed once it is visible.
//   - Nothing in content knows containerd's snapshotter API, gRPC or Prometheus.
//
// # On disk
//
//	<root>/
//	  format                     layout version
//	  lock                       held by the daemon that serves from here
//	  running, clean             whether the last stop was clean, and up to when all is on the disk
//	  damaged                    what is known to be damaged; only while something is
//	  metadata.db                snapshots (owned by package snapshotter)
//	  packs/<13 hex>.erofs       payloads
//	  objects/, former           what containers from before an upgrade still need; gone after it
//	  layers/<64 hex>            trees
//	  recipes/<64 hex>-<64 hex>  how to make a blob of a layer again; may be missing
//	  chains/<64 hex>.erofs      chain images; a cache
//	  snapshots/<id>/{fs,work}   active snapshots
//	  mounts                     a symbolic link to where chain images are mounted, for mapped containers
//	  ingest/                    staging; emptied at start
//	  empty/                     below containers without a parent
//	  metacopy                   overlays have been mounted with metacopy=on
//	  lost+found/<id>            active snapshots of which metadata.db had lost the record
package content
