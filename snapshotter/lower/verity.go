package lower

import (
	"errors"
	"fmt"
)

// Verity says whether packs and chain images get fs-verity. Then chain images hold the digests of their packs, and
// none is mounted over another file.
type Verity string

const (
	// VerityOff: no.
	VerityOff Verity = "off"
	// VerityAuto: where the file system can.
	VerityAuto Verity = "auto"
	// VerityOn: yes, or the store does not open.
	VerityOn Verity = "on"
)

// decide returns why there will be no fs-verity, nil when there will be; missing is what the kernel or the file
// system lacks.
func (v Verity) decide(missing error) (no, err error) {
	switch v {
	case "", VerityOff:
		return errors.New("not asked for"), nil
	case VerityAuto:
		return missing, nil
	case VerityOn:
		if missing != nil {
			return missing, fmt.Errorf("fs-verity is asked for and does not work here (ext4 has it with the feature "+
				"verity: `tune2fs -O verity` on its device; "+
				"else set verity to \"auto\" or \"off\"): %w", missing)
		}
		return nil, nil
	}
	return nil, fmt.Errorf("verity %q: want auto, on or off", string(v))
}
