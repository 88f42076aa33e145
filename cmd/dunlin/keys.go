package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/dunlin/dunlin/internal/pki"
	"github.com/dunlin/dunlin/models/signing"
)

func (c *cli) keysCommand() *cobra.Command {
	create := &cobra.Command{
		Use:   "create FILE",
		Short: "Make a key that signs",
		Long: `create makes an ECDSA P-256 key, writes it to FILE, as PKCS #8 in PEM that only
its owner can read, and its public key to FILE.pub. It prints the key's id. A
file that is there stays as it is.`,
		Example: "  dunlin keys create publisher.pem",
		Args:    arguments(1, 1),
		RunE: func(_ *cobra.Command, args []string) error {
			key, err := pki.NewKey()
			if err != nil {
				return err
			}
			public, err := signing.EncodePublicKey(key.Public())
			if err != nil {
				return err
			}
			if err := pki.WriteKey(args[0], key); err != nil {
				return err
			}
			if err := pki.WriteFile(args[0]+".pub", public, 0o644); err != nil {
				return err
			}
			id, err := signing.KeyID(key.Public())
			fmt.Fprintln(c.out, id)
			return err
		},
	}
	return group("keys", "Make keys that sign", create)
}

// readSigner reads who signs: a key, and its certificates where they are named.
func readSigner(keyFile, certFile string) (by signing.Signer, err error) {
	if by.Key, err = pki.ReadKey(keyFile); err != nil || certFile == "" {
		return by, err
	}
	by.Certificates, err = pki.ReadCertificates(certFile)
	return by, err
}

func (c *cli) signAgentCommand() *cobra.Command {
	var keyFile, certFile, version, arch string
	cmd := &cobra.Command{
		Use:   "sign-agent BINARY",
		Short: "Sign an agent binary",
		Long: `sign-agent signs an agent binary by a key that is kept offline, and writes
BINARY.sig. dunlin-agent verify BINARY checks it on a device.`,
		Example: "  dunlin sign-agent dunlin-agent --key agent.pem --version 0.7.0 --arch linux/arm64",
		Args:    arguments(1, 1),
		RunE: func(_ *cobra.Command, args []string) error {
			if keyFile == "" || version == "" {
				return usagef("--key and --version must say who signs, and as what")
			}
			system, machine, ok := strings.Cut(arch, "/")
			if !ok {
				return usagef("--arch %q is not OS/ARCH, as linux/amd64", arch)
			}
			by, err := readSigner(keyFile, certFile)
			if err != nil {
				return err
			}
			sum, err := sumOf(args[0])
			if err != nil {
				return err
			}
			raw, err := signing.SignBinary(by, signing.Binary{Version: version, OS: system, Arch: machine}, sum)
			if err != nil {
				return fmt.Errorf("sign %s: %w", args[0], err)
			}
			return pki.WriteFile(args[0]+".sig", raw, 0o644)
		},
	}
	cmd.Flags().StringVar(&keyFile, "key", "", "file with the key that signs, PKCS #8 in PEM")
	cmd.Flags().StringVar(&certFile, "cert", "", "file with the key's certificate and those up to the authority, in PEM")
	cmd.Flags().StringVar(&version, "version", "", "version of the binary, as 0.7.0")
	cmd.Flags().StringVar(&arch, "arch", "", "what it runs on, as linux/amd64")
	return cmd
}
