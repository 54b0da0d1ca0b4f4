package rootfs

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Used is what a directory costs on its file system.
type Used struct {
	Bytes  int64 `json:"bytes"`  // allocated blocks
	Inodes int64 `json:"inodes"` // hardlinked ones once
}

// Sub returns u - v.
func (u Used) Sub(v Used) Used { return Used{u.Bytes - v.Bytes, u.Inodes - v.Inodes} }

// Usage counts the allocated blocks and the inodes at and below dir, each inode once,
// without crossing into other file systems. Files that vanish meanwhile are skipped.
func Usage(dir string) (Used, error) {
	var root unix.Stat_t
	if err := unix.Lstat(dir, &root); err != nil {
		return Used{}, fmt.Errorf("measure %s: %w", dir, err)
	}
	var used Used
	seen := map[uint64]bool{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); errors.Is(err, unix.ENOENT) {
			return nil
		} else if err != nil {
			return fmt.Errorf("lstat %s: %w", path, err)
		}
		if st.Dev != root.Dev {
			if d.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		if seen[st.Ino] {
			return nil
		}
		if st.Nlink > 1 {
			seen[st.Ino] = true
		}
		used.Bytes += st.Blocks * 512 // stat(2): blocks are 512 B whatever st_blksize says
		used.Inodes++
		return nil
	})
	if err != nil {
		return Used{}, fmt.Errorf("measure %s: %w", dir, err)
	}
	return used, nil
}
