package main

import (
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"
)

const (
	// progressAfter is how long a command may be silent.
	progressAfter = 2 * time.Second
	progressEvery = 300 * time.Millisecond
)

// showProgress keeps one line on a terminal up to date while something takes long. It shows nothing where
// nobody watches. The caller calls stop, as often as it likes, before it prints anything else.
func showProgress(c *cli.Context, line func() string) (stop func()) {
	if jsonWanted(c) || !terminal(c.App.ErrWriter) {
		return func() {}
	}
	done, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		shown := false
		for wait := progressAfter; ; wait = progressEvery {
			select {
			case <-time.After(wait):
				shown = true
				fmt.Fprintf(c.App.ErrWriter, "\r\x1b[K%s", line()) // \x1b[K clears the rest of the line
			case <-done:
				if shown {
					fmt.Fprint(c.App.ErrWriter, "\r\x1b[K")
				}
				return
			}
		}
	}()
	return sync.OnceFunc(func() {
		close(done)
		<-ended
	})
}

// terminal reports whether a person looks at w.
func terminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}
