package layer

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestExplain(t *testing.T) {
	at := func(path string, errno unix.Errno) error {
		return fmt.Errorf("do it: %w", &fs.PathError{Op: "mkdir", Path: path, Err: errno})
	}
	for _, row := range []struct {
		err  error
		want string
	}{
		{at("/root/layers/x", unix.ENOSPC),
			"no space left on device (free space or inodes on the file system of /root, or remove images)"},
		{at("/run/chains/x", unix.ENOSPC),
			"no space left on device (free space or inodes on the file system of /run/chains/x, or remove images)"},
		{fmt.Errorf("sync: %w", unix.EIO), "input/output error (the disk under /root does not work"},
		{fmt.Errorf("outer: %w", Explain(at("/root/x", unix.EMFILE), "/root")), "too many open files (the daemon for /root"},
	} {
		err := Explain(row.err, "/root")
		if !strings.Contains(err.Error(), row.want) || !errors.Is(err, row.err) || strings.Count(err.Error(), "(") != 1 ||
			!Explained(err) {
			t.Errorf("%v, want %s", err, row.want)
		}
	}
	if plain := errors.New("plain"); Explain(plain, "/root") != plain || Explained(plain) || Explain(nil, "/root") != nil {
		t.Error("explained what is none of ours")
	}
}
