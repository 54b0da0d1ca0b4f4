package image

import (
	"archive/tar"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
)

// WriteLayout writes an image as a tar of an OCI layout, under the name that containerd shall give it.
func WriteLayout(path, ref string, img v1.Image) (err error) {
	dir, err := os.MkdirTemp("", "layout-")
	if err != nil {
		return fmt.Errorf("write layout: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	l, err := layout.Write(dir, empty.Index)
	if err == nil {
		err = l.AppendImage(img, layout.WithAnnotations(map[string]string{"io.containerd.image.name": ref}))
	}
	if err != nil {
		return fmt.Errorf("write layout: %w", err)
	}
	f, err := os.Create(path)
	if err != nil {
		return fmt.Errorf("write layout: %w", err)
	}
	w := tar.NewWriter(f)
	if err := errors.Join(w.AddFS(os.DirFS(dir)), w.Close(), f.Close()); err != nil {
		return fmt.Errorf("write layout %s: %w", filepath.Base(path), err)
	}
	return nil
}
