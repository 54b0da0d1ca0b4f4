package lower

import (
	"errors"
	"fmt"
	"strings"
)

// Stack says what an overlay is made of.
type Stack struct {
	// Lower are the directories below, the topmost first.
	Lower []string
	// Packs are where the packs are mounted in which the last of Lower, a shared chain image, has its payloads; none for
	// any other.
	Packs []string
	// Upper and Work are there when the overlay can be written to.
	Upper, Work string
	// UIDs and GIDs are how containerd maps owners, as its labels have it; "" for not at all. Then Lower is one directory,
	// the root of a file system, and there are no Packs.
	UIDs, GIDs string
}

// maxOptions is how long all options of a mount may be together. containerd rewrites longer ones (one page less 512
// bytes), for which it takes the first lowerdir= alone, and the kernel silently cuts what is longer than a page.
const maxOptions = 4096 - 512

// ErrTooLong is wrapped when a stack's options do not fit a mount.
var ErrTooLong = errors.New("mount options are too long: use shorter paths for root and run_dir")

// Overlay returns the options of an overlay mount. It alone says what they look like.
//
// Over a shared chain image these readers find their way in them:
//
//   - The kernel takes the last lowerdir= there is: the image over its packs as data-only layers.
//   - Programs that read options without mounting (containerd's fsview and applier, scanners) take the last option that
//     begins with "lowerdir=": the image, which shows every byte by itself.
//   - containerd and BuildKit make a mount read-only by leaving out what begins with "workdir=" or "upperdir=", and
//     putting the upper directory before what begins with "lowerdir=". So an option that they leave as it is says what
//     the kernel has to mount then, the upper directory included; in a mount that can be written, the one with the
//     working directory comes after it.
//   - BuildKit leaves out what begins with "redirect_dir=" and adds redirect_dir=off at the end. Nothing that is needed
//     begins so, and data-only layers do not need redirect_dir where they do not need metacopy=on. Where they do
//     (before Linux 6.16) the kernel refuses the two together, and BuildKit needs page_cache = "private".
//
// Owners are mapped by containerd, for which it clones the mount of the directory in which the lower one lies, and maps
// that. The lower one is said to lie in itself ("/."), so that this is the mount of the image and no other. Before 2.3
// it also does so for a mount that is made read-only, when the upper directory is a lower one, too: then it maps what
// is above both. So Lower has to be given by a symbolic link that lies beside the upper directories, and the image is
// found, not mapped; that is enough to look up users. The mapping comes first, as overlayfs has it: at the end it makes
// containerd's RemoveIDMapOption panic, up to 2.2.
func (k Kernel) Overlay(s Stack) (options []string, err error) {
	defer func() {
		if n := length(options); err == nil && n > maxOptions {
			err = fmt.Errorf("%d bytes of overlay options, %d fit: %w", n, maxOptions, ErrTooLong)
		}
	}()
	lower := "lowerdir=" + strings.Join(s.Lower, ":")
	if s.UIDs != "" {
		k.Metacopy = false // such an upper directory has never been under anything but a private image
		options = append(k.begin(k.alone()), mapping(s)...)
		return append(options, "workdir="+s.Work, "upperdir="+s.Upper, lower+"/."), nil
	}
	if len(s.Packs) == 0 {
		options = k.begin(k.alone())
		if s.Upper != "" {
			options = append(options, "workdir="+s.Work, "upperdir="+s.Upper)
		}
		return append(options, lower), nil
	}
	data := "::" + strings.Join(s.Packs, "::")
	over := func(lower string) string { return k.overPacks() + ",lowerdir=" + lower + data }
	chain := strings.Join(s.Lower, ":")
	if s.Upper == "" {
		return append(k.begin(""), lower, over(chain)), nil
	}
	return append(k.begin(""), "upperdir="+s.Upper, lower, over(s.Upper+":"+chain), "workdir="+s.Work+","+over(chain)), nil
}

// Bind returns the options of a read-only view of one directory.
func Bind(s Stack) []string {
	if s.UIDs != "" {
		return append(mapping(s), "rbind") // containerd does not map a bind mount with "ro"; an image is that by itself
	}
	return []string{"ro", "rbind"}
}

func mapping(s Stack) []string { return []string{"uidmap=" + s.UIDs, "gidmap=" + s.GIDs} }

// Options returns what a container's overlay gets beside directories.
func (k Kernel) Options() []string {
	if k.Shared {
		return k.begin(k.overPacks())
	}
	return k.begin(k.alone())
}

// length is how containerd measures options, with what joins them.
func length(options []string) (n int) {
	for _, o := range options {
		n += len(o) + 1
	}
	return n
}

const metacopyOn = "redirect_dir=on,metacopy=on"

func (k Kernel) begin(second string) []string {
	if second == "" {
		return []string{"index=off"}
	}
	return []string{"index=off", second}
}

// xino=on would give image files numbers from 2^63 on, which programs that keep them in a double, or in 32 bits,
// cannot tell apart.
func (k Kernel) xino() string {
	if k.Defaults.Xino {
		return ",xino=off"
	}
	return ""
}

// alone is what an overlay without packs needs, "" for nothing.
func (k Kernel) alone() string {
	switch {
	case k.Metacopy:
		return metacopyOn + k.xino()
	case k.Defaults == Defaults{}:
		return ""
	}
	// A renamed directory would be a redirect that no image can express.
	return "redirect_dir=off,metacopy=off" + k.xino()
}

// overPacks is what an overlay over packs needs. It must not begin with "redirect_dir=".
func (k Kernel) overPacks() string {
	if k.Metacopy {
		return "metacopy=on,redirect_dir=on" + k.xino()
	}
	return "metacopy=off,redirect_dir=follow" + k.xino()
}
