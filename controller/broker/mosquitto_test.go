package broker

import (
	"testing"

	"github.com/dunlin/dunlin/internal/link"
)

func TestControllerUserIsNoDevice(t *testing.T) {
	if link.CheckDevice(ControllerUser) == nil {
		t.Errorf("a device can be called %s", ControllerUser)
	}
}
