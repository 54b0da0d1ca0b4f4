package powercut

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// What a program writes has reached the recorder before the flush that its fsync asks for, and not before that.
func TestRecorder(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: it mounts file systems")
	}
	for _, on := range []fileSystem{ext4, xfs} {
		t.Run(on.name, func(t *testing.T) {
			dir := memory(t)
			d, _ := format(t, dir, on)
			at := filepath.Join(dir, "at")
			if err := os.Mkdir(at, 0o700); err != nil {
				t.Fatal(err)
			}
			d.attach(t, on.name, at)
			before := d.length()
			mark := bytes.Repeat([]byte("durable?"), 512)
			// Another process, as everywhere here.
			script := `printf '%s' "$MARK" > file && sync file && echo`
			cmd := exec.Command("sh", "-c", script)
			cmd.Dir, cmd.Env = at, append(os.Environ(), "MARK="+string(mark))
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			written, flushed := -1, -1
			log := d.recorded()[before:]
			for i, o := range log {
				if bytes.Contains(o.data, mark) {
					written = i
				}
				if o.data == nil {
					flushed = i
				}
			}
			if written < 0 || flushed < written {
				t.Errorf("of %d operations the write is number %d, and the last flush number %d", len(log), written, flushed)
			}
		})
	}
}
