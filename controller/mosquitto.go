package controller

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"

	"github.com/dunlin/dunlin/controller/broker"
	"github.com/dunlin/dunlin/controller/store"
	"github.com/dunlin/dunlin/internal/program"
)

// MosquittoConfig is what SetUpMosquitto goes by.
type MosquittoConfig struct {
	Config // the controller's own
	// Dir is the folder that is made, Host what devices call the broker.
	Dir, Host string
	// EnrolPort is of a listener for devices that enrol; 0: none.
	Port, EnrolPort int
}

// LoadMosquittoConfig is the LoadConfig of SetUpMosquitto.
func LoadMosquittoConfig(args []string, getenv func(string) string, output io.Writer) (MosquittoConfig, error) {
	c := MosquittoConfig{Config: DefaultConfig(), Port: 8883}
	settings := append(c.settings(),
		program.Setting{Name: "dir", Usage: "`folder` for Mosquitto's files, the controller's --mosquitto-dir", Value: &c.Dir},
		program.Setting{Name: "host", Usage: "`name` or address that devices call Mosquitto by, as in the controller's --broker-url", Value: &c.Host},
		program.Setting{Name: "port", Usage: "`port` for devices and the controller, by certificate", Value: &c.Port},
		program.Setting{Name: "enrol-port", Usage: "`port` for devices that enrol by MQTT, by join token; 0 for none", Value: &c.EnrolPort},
	)
	err := program.Source{
		Program: "dunlin-controller broker config mosquitto", Prefix: environment,
		Notes: "Makes a folder with a configuration for Mosquitto, and the files that the controller keeps in it.",
		Args:  args, Getenv: getenv, Help: output,
	}.Load(settings, &c.Config, nil)
	if errors.Is(err, flag.ErrHelp) {
		return c, err
	}
	c.BrokerURL, c.MosquittoDir = "mqtts://"+net.JoinHostPort(c.Host, strconv.Itoa(c.Port)), c.Dir
	faults := []error{c.check()}
	for name, value := range map[string]string{"dir": c.Dir, "host": c.Host} {
		if value == "" {
			faults = append(faults, fmt.Errorf("%s is missing", name))
		}
	}
	if c.EnrolPort < 0 || c.EnrolPort > 65535 || c.EnrolPort == c.Port {
		faults = append(faults, fmt.Errorf("enrol-port is %d, it must be another port than %d, or 0", c.EnrolPort, c.Port))
	}
	if faults := errors.Join(faults...); faults != nil {
		err = errors.Join(err, fmt.Errorf("%w: %w", program.ErrUsage, faults))
	}
	return c, err
}

// SetUpMosquitto makes the folder with which a Mosquitto is started, from the
// data of a controller that does not run.
func SetUpMosquitto(ctx context.Context, c MosquittoConfig) (err error) {
	if err := os.MkdirAll(c.Data, 0o700); err != nil {
		return fmt.Errorf("make data folder: %w", err)
	}
	lock, err := program.LockFolder(c.Data)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	st, err := store.Open(ctx, filepath.Join(c.Data, storeFile), store.Options{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, st.Close()) }()
	trust, err := openTrust(ctx, c.Config, st)
	if err != nil {
		return err
	}
	return setUpMosquitto(ctx, c, trust.forBroker(nil, nil))
}

func setUpMosquitto(ctx context.Context, c MosquittoConfig, t brokerTrust) error {
	files, err := t.mosquitto(ctx, c.Host)
	if err != nil {
		return err
	}
	dir, err := filepath.Abs(c.Dir) // for Mosquitto, wherever it is started
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make folder for Mosquitto: %w", err)
	}
	return (&broker.Mosquitto{Dir: dir}).Setup(c.Port, c.EnrolPort, files)
}
