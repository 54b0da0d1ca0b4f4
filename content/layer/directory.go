package layer

// directory is the store's, with its options: what lies where, and what the file system has free.
type directory struct {
	root   string
	rootFd int // open on root from openDirs to closeFiles
	opts   Options
	room   room
}
