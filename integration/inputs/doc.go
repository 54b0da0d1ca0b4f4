// Package inputs makes the real file systems that tests and benchmarks measure, once,
// in the cache: a Debian root made by debootstrap, and layers made by pip inside it.
//
// Two apps are two separate runs of pip install, seconds or minutes apart: their files
// have the same bytes but other mtimes, and Python's compiled files differ by the
// source mtime that they hold. The second app's files also get another owner.
//
// # On disk, below the cache
//
//	inputs/<recipe>/          recipe: a hash of everything that decides the result
//	  rootfs/                 Debian, as debootstrap leaves it
//	  wheels/                 what pip downloaded
//	  debian.json app-*.json  the layers (package image's Save)
//	  sha256/<64 hex>         their blobs
//	inputs/programs-<recipe>/ the layer of Programs
//
// No setting of this machine (proxies, registries, certificates) gets into a layer: the
// downloads happen outside of the root file system and pip runs there offline.
// DEBIAN_MIRROR names a mirror for debootstrap; PIP_* settings apply to the download.
package inputs
