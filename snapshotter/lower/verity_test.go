package lower

import (
	"errors"
	"testing"
)

func TestVerityDecides(t *testing.T) {
	missing := errors.New("not here")
	for _, row := range []struct {
		v       Verity
		missing error
		on      bool
		opens   bool
	}{
		{"", nil, false, true},
		{VerityOff, nil, false, true},
		{VerityAuto, nil, true, true},
		{VerityOn, nil, true, true},
		{VerityAuto, missing, false, true},
		{VerityOn, missing, false, false},
		{"maybe", nil, false, false},
	} {
		no, err := row.v.decide(row.missing)
		if (err == nil) != row.opens || err == nil && (no == nil) != row.on {
			t.Errorf("%q, %v: %v, %v", row.v, row.missing, no, err)
		}
	}
}
