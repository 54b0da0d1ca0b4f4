// Package compare is the other half of containerd's diff service: it writes what an upper set of mounts adds to a lower
// one, as a layer.
//
// containerd's own differ walks both root file systems. This one knows beforehand where they can differ: at the names
// in the layers that only one side has, and in an upper directory. It looks at these alone (changes), and hands what
// differs to containerd's writer of layers, so that both differs give the same bytes.
//
// While the tar is compressed it is also ingested. The layer is then known to the store: the node that made an image
// reads none of its blobs when it pulls it.
package compare
