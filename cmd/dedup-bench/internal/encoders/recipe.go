package encoders

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
)

// part is what stands before a file's content in a tar, and the content.
type part struct {
	meta, content []byte
}

// split takes a tar apart. archive/tar reads no further than it has to, so that the place in the tar tells what is a
// header or padding and what is content.
func split(data []byte) (parts []part, pycs int, err error) {
	r := bytes.NewReader(data)
	at := func() int { return len(data) - r.Len() }
	tr, from := tar.NewReader(onlyReader{r}), 0
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return append(parts, part{meta: data[from:]}), pycs, nil
		}
		if err != nil {
			return nil, 0, fmt.Errorf("read tar: %w", err)
		}
		p := part{meta: data[from:at()]}
		from = at()
		if _, err := io.Copy(io.Discard, tr); err != nil {
			return nil, 0, fmt.Errorf("read %s: %w", h.Name, err)
		}
		p.content = data[from:at()]
		from = at()
		parts = append(parts, p)
		if strings.HasSuffix(h.Name, ".pyc") && len(p.content) >= 16 && bytes.Equal(p.content[4:8], make([]byte, 4)) {
			pycs++
		}
	}
}

// onlyReader hides Seek: with it, a tar.Reader would skip.
type onlyReader struct{ r io.Reader }

func (o onlyReader) Read(p []byte) (int, error) { return o.r.Read(p) }
