package api

import (
	"cmp"
	"context"
	"errors"
	"time"
	"unicode"
	"unicode/utf8"

	"connectrpc.com/connect"

	"github.com/dunlin/dunlin/controller/fleet"
	"github.com/dunlin/dunlin/controller/identity"
	"github.com/dunlin/dunlin/controller/store"
	v1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// The limits of tokens.
const (
	tokenPrefix       = "dunlin_"
	loginValidFor     = 12 * time.Hour
	defaultTokenValid = 90 * 24 * time.Hour
	maxTokenValid     = 365 * 24 * time.Hour
	maxComment        = 200 // characters
)

func (s *server) GetLoginMethods(context.Context, *connect.Request[v1.GetLoginMethodsRequest]) (*connect.Response[v1.GetLoginMethodsResponse], error) {
	resp := &v1.GetLoginMethodsResponse{Password: true}
	if o := s.Auth.OIDC(); o != nil {
		resp.OidcIssuer, resp.OidcClientId = o.Issuer, o.ClientID
	}
	return connect.NewResponse(resp), nil
}

func (s *server) Login(ctx context.Context, req *connect.Request[v1.LoginRequest]) (*connect.Response[v1.LoginResponse], error) {
	name := req.Msg.GetName()
	u, err := s.Store.User(ctx, name)
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return nil, err
	}
	attempt := identity.Attempt{From: identity.FromContext(ctx).From, Name: name, Credential: req.Msg.GetPassword()}
	if err := s.Auth.Login(ctx, attempt, u.Password); err != nil {
		return nil, err
	}
	token, hash := identity.NewToken(tokenPrefix)
	t, err := s.Store.CreateToken(ctx, "user:"+name, hash, store.Token{User: name, Comment: "login", Login: true, ExpiresAt: time.Now().Add(loginValidFor)})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&v1.LoginResponse{Token: token, ExpiresAt: timestamp(t.ExpiresAt), Id: t.ID}), nil
}

// password gives a password in the form that is kept; "" stays so.
func (s *server) password(ctx context.Context, password string) (string, error) {
	if password == "" {
		return "", nil
	}
	if err := identity.CheckPassword(password); err != nil {
		return "", invalid("%w", err)
	}
	return s.Auth.HashPassword(ctx, password)
}

func (s *server) CreateUser(ctx context.Context, req *connect.Request[v1.CreateUserRequest]) (*connect.Response[v1.CreateUserResponse], error) {
	m := req.Msg
	u := store.User{Name: m.GetName(), Role: identity.Role(m.GetRole()), Scope: m.GetScope()}
	if err := identity.CheckUser(u.Name); err != nil {
		return nil, invalid("%w", err)
	}
	if err := identity.CheckRole(u.Role); err != nil {
		return nil, invalid("%w", err)
	}
	if err := fleet.CheckLabels(u.Scope); err != nil {
		return nil, invalid("scope: %w", err)
	}
	var err error
	if u.Password, err = s.password(ctx, m.GetPassword()); err != nil {
		return nil, err
	}
	if u, err = s.Store.CreateUser(ctx, caller(ctx), u); err != nil {
		return nil, err
	}
	return connect.NewResponse(&v1.CreateUserResponse{User: userOf(u)}), nil
}

func (s *server) UpdateUser(ctx context.Context, req *connect.Request[v1.UpdateUserRequest]) (*connect.Response[v1.UpdateUserResponse], error) {
	m := req.Msg
	if m.Role != nil {
		if err := identity.CheckRole(identity.Role(m.GetRole())); err != nil {
			return nil, invalid("%w", err)
		}
	}
	if err := fleet.CheckLabels(m.GetScope()); err != nil {
		return nil, invalid("scope: %w", err)
	}
	if len(m.GetScope()) > 0 && !m.GetSetScope() {
		return nil, invalid("scope is %s, but set_scope is false", identity.LabelsText(m.GetScope()))
	}
	before, err := s.Store.User(ctx, m.GetName())
	if err != nil {
		return nil, err
	}
	if before.External {
		return nil, invalid("user %s signs in by OpenID Connect, which says role and scope", before.Name)
	}
	password, err := s.password(ctx, m.GetPassword())
	if err != nil {
		return nil, err
	}
	u, err := s.Store.UpdateUser(ctx, caller(ctx), m.GetName(), func(u *store.User) {
		if m.Role != nil {
			u.Role = identity.Role(m.GetRole())
		}
		if m.Password != nil {
			u.Password = password
		}
		if m.GetSetScope() {
			u.Scope = m.GetScope()
		}
	})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&v1.UpdateUserResponse{User: userOf(u)}), nil
}

func (s *server) DeleteUser(ctx context.Context, req *connect.Request[v1.DeleteUserRequest]) (*connect.Response[v1.DeleteUserResponse], error) {
	if err := s.Store.DeleteUser(ctx, caller(ctx), req.Msg.GetName()); err != nil {
		return nil, err
	}
	return connect.NewResponse(&v1.DeleteUserResponse{}), nil
}

func (s *server) ListUsers(ctx context.Context, _ *connect.Request[v1.ListUsersRequest]) (*connect.Response[v1.ListUsersResponse], error) {
	users, err := s.Store.Users(ctx)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&v1.ListUsersResponse{Users: convert(users, userOf)}), nil
}

func (s *server) CreateToken(ctx context.Context, req *connect.Request[v1.CreateTokenRequest]) (*connect.Response[v1.CreateTokenResponse], error) {
	m, p := req.Msg, identity.FromContext(ctx)
	validFor := defaultTokenValid
	if m.GetValidFor() != nil {
		if validFor = m.GetValidFor().AsDuration(); validFor <= 0 || validFor > maxTokenValid {
			return nil, invalid("valid_for is %s, it must be above 0 and at most %s", validFor, maxTokenValid)
		}
	}
	if err := checkComment(m.GetComment()); err != nil {
		return nil, err
	}
	if err := fleet.CheckLabels(m.GetScope()); err != nil {
		return nil, invalid("scope: %w", err)
	}
	// Nobody makes a token for more than they may with what they showed.
	owner, until := p, time.Now().Add(validFor)
	if name := cmp.Or(m.GetUser(), p.Name); name != p.Name {
		if err := identity.Allow(p, identity.CreateOthersToken); err != nil {
			return nil, err
		}
		u, err := s.Store.User(ctx, name)
		if err != nil {
			return nil, err
		}
		owner = identity.Principal{Kind: identity.User, Name: u.Name, Role: u.Role, Scope: u.Scope}
	} else if !p.SignedIn && !p.Expires.IsZero() && until.After(p.Expires) {
		// A token that was lost ends when it was to end.
		if m.GetValidFor() != nil {
			return nil, invalid("valid_for is %s, the token that you show ends before, on %s: sign in, or show one for longer", validFor, p.Expires.Format(time.RFC3339))
		}
		until = p.Expires
	} else if p.External {
		if err := s.Store.External(ctx, p, true); err != nil {
			return nil, err
		}
	}
	t := store.Token{User: owner.Name, Comment: m.GetComment(), Role: owner.Role, ExpiresAt: until}
	if m.GetRole() != "" {
		t.Role = identity.Role(m.GetRole())
		if err := identity.CheckRole(t.Role); err != nil {
			return nil, invalid("%w", err)
		}
		if !owner.May(t.Role) {
			return nil, invalid("role is %s, that of %s is %s", t.Role, owner, owner.Role)
		}
	}
	var ok bool
	if t.Scope, ok = owner.Narrow(m.GetScope()); !ok {
		return nil, invalid("scope %s has nothing in common with that of %s, %s", identity.LabelsText(m.GetScope()), owner, identity.LabelsText(owner.Scope))
	}
	token, hash := identity.NewToken(tokenPrefix)
	t, err := s.Store.CreateToken(ctx, caller(ctx), hash, t)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&v1.CreateTokenResponse{Token: token, Info: tokenOf(t)}), nil
}

func checkComment(comment string) error {
	if n := utf8.RuneCountInString(comment); n > maxComment {
		return invalid("comment has %d characters, the limit is %d", n, maxComment)
	}
	for _, r := range comment {
		if !unicode.IsPrint(r) {
			return invalid("comment has the character %q, which cannot be shown", r)
		}
	}
	return nil
}

func (s *server) ListTokens(ctx context.Context, req *connect.Request[v1.ListTokensRequest]) (*connect.Response[v1.ListTokensResponse], error) {
	p, user := identity.FromContext(ctx), req.Msg.GetUser()
	if err := identity.Allow(p, identity.ListOthersTokens); err != nil && user == "" {
		user = p.Name
	} else if err != nil && user != p.Name {
		return nil, err
	}
	tokens, err := s.Store.Tokens(ctx, user)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&v1.ListTokensResponse{Tokens: convert(tokens, tokenOf)}), nil
}

func (s *server) DeleteToken(ctx context.Context, req *connect.Request[v1.DeleteTokenRequest]) (*connect.Response[v1.DeleteTokenResponse], error) {
	p := identity.FromContext(ctx)
	of := p.Name
	if identity.Allow(p, identity.DeleteOthersToken) == nil {
		of = ""
	}
	if err := s.Store.DeleteToken(ctx, caller(ctx), req.Msg.GetId(), of); err != nil {
		return nil, err
	}
	return connect.NewResponse(&v1.DeleteTokenResponse{}), nil
}

func userOf(u store.User) *v1.User {
	return &v1.User{Name: u.Name, Role: string(u.Role), Scope: u.Scope, HasPassword: u.Password != "", CreatedAt: timestamp(u.CreatedAt), External: u.External}
}

func tokenOf(t store.Token) *v1.Token {
	return &v1.Token{
		Id: t.ID, User: t.User, Comment: t.Comment, Role: string(t.Role), Scope: t.Scope,
		CreatedAt: timestamp(t.CreatedAt), ExpiresAt: timestamp(t.ExpiresAt), LastUsedAt: timestamp(t.LastUsedAt),
	}
}
