package identity

import (
	"fmt"
	"maps"
	"slices"

	v1connect "github.com/dunlin/dunlin/proto/dunlin/v1/dunlinv1connect"
)

// Scoping says how the scope of a user bounds an action.
type Scoping int

// How scopes count.
const (
	Ignored Scoping = iota // what it is about belongs to no device
	Within                 // it shows and changes only what lies within the scope
	Whole                  // only for those who have no scope
)

// Anyone is the role of those who need no identity.
const Anyone = Role("")

// The actions that are no procedure of the API, or only a part of one.
const (
	RegistryList = "registry: list all models"
	RegistryPull = "registry: pull"
	RegistryPush = "registry: push"
	Health       = "GET /healthz"
	Metrics      = "GET /metrics, not from this machine itself"
	ConsoleDoor  = "console: signing in and out, theme, files of the pages"
	ConsolePages = "console: pages and live streams"

	ApplyRoute        = v1connect.ObjectServiceApplyProcedure + ": a Route"
	DeleteRoute       = v1connect.ObjectServiceDeleteProcedure + ": a Route"
	CreateOthersToken = v1connect.UserServiceCreateTokenProcedure + ": of another user"
	ListOthersTokens  = v1connect.UserServiceListTokensProcedure + ": of other users"
	DeleteOthersToken = v1connect.UserServiceDeleteTokenProcedure + ": of another user"
)

// Rule is who may do one thing.
type Rule struct {
	Least   Role // Anyone, or the least role of a user
	Devices bool // whether devices may, too
	Scoping Scoping
	Note    string
}

// rules is the one place that says who may do what. What is not here nobody
// may do.
var rules = map[string]Rule{
	v1connect.AuthServiceWhoAmIProcedure:          {Least: Viewer},
	v1connect.AuthServiceLoginProcedure:           {Note: "by name and password"},
	v1connect.AuthServiceGetLoginMethodsProcedure: {},

	v1connect.UserServiceCreateUserProcedure:  {Least: Admin, Scoping: Whole},
	v1connect.UserServiceUpdateUserProcedure:  {Least: Admin, Scoping: Whole},
	v1connect.UserServiceDeleteUserProcedure:  {Least: Admin, Scoping: Whole},
	v1connect.UserServiceListUsersProcedure:   {Least: Admin, Scoping: Whole},
	v1connect.UserServiceCreateTokenProcedure: {Least: Viewer, Note: "of oneself, for no more than one may"},
	v1connect.UserServiceListTokensProcedure:  {Least: Viewer, Note: "of oneself"},
	v1connect.UserServiceDeleteTokenProcedure: {Least: Viewer, Note: "of oneself"},
	CreateOthersToken:                         {Least: Admin, Scoping: Whole},
	ListOthersTokens:                          {Least: Admin, Scoping: Whole},
	DeleteOthersToken:                         {Least: Admin, Scoping: Whole},

	v1connect.AuditServiceListAuditProcedure: {Least: Admin, Scoping: Whole},

	v1connect.TrustServiceGetTrustProcedure:        {Least: Viewer},
	v1connect.TrustServicePutTrustProcedure:        {Least: Admin, Scoping: Whole},
	v1connect.TrustServiceGetAuthoritiesProcedure:  {Least: Viewer},
	v1connect.TrustServiceRotateAuthorityProcedure: {Least: Admin, Scoping: Whole},
	v1connect.TrustServiceRetireAuthorityProcedure: {Least: Admin, Scoping: Whole},

	v1connect.EnrollmentServiceJoinProcedure:            {Note: "by its join token"},
	v1connect.EnrollmentServiceRenewProcedure:           {Note: "by the old key's signature"},
	v1connect.EnrollmentServiceGetTimeProcedure:         {},
	v1connect.EnrollmentServiceCreateJoinTokenProcedure: {Least: Admin, Scoping: Within, Note: "its labels include the scope"},
	v1connect.EnrollmentServiceDeleteJoinTokenProcedure: {Least: Admin, Scoping: Within, Note: "its labels include the scope"},
	v1connect.EnrollmentServiceListJoinTokensProcedure:  {Least: Admin, Scoping: Within, Note: "those whose labels include the scope"},

	v1connect.ModelServiceCreateVersionProcedure: {Least: Operator},
	v1connect.ModelServiceListModelsProcedure:    {Least: Viewer},
	v1connect.ModelServiceDeleteVersionProcedure: {Least: Admin, Scoping: Whole},

	v1connect.ObjectServiceApplyProcedure:           {Least: Operator, Scoping: Within, Note: "what has a selector that, with that before, includes the scope"},
	v1connect.ObjectServiceDeleteProcedure:          {Least: Operator, Scoping: Within, Note: "what has a selector that includes the scope"},
	ApplyRoute:                                      {Least: Operator, Scoping: Whole},
	DeleteRoute:                                     {Least: Operator, Scoping: Whole},
	v1connect.ObjectServiceListDeploymentsProcedure: {Least: Viewer, Scoping: Within, Note: "those that can match a device within the scope"},
	v1connect.ObjectServiceListRoutesProcedure:      {Least: Viewer},
	v1connect.ObjectServiceListObjectsProcedure:     {Least: Viewer, Scoping: Within, Note: "Routes, and of others those that can match a device within the scope"},

	v1connect.ProfileServiceListProfilesProcedure: {Least: Viewer, Scoping: Within},
	v1connect.ProfileServicePlanProcedure:         {Least: Viewer, Scoping: Within},

	v1connect.RolloutServiceListRolloutsProcedure:   {Least: Viewer, Scoping: Within, Note: "as ListDeployments, with the devices within the scope"},
	v1connect.RolloutServiceGetRolloutProcedure:     {Least: Viewer, Scoping: Within, Note: "as ListRollouts"},
	v1connect.RolloutServiceWatchRolloutProcedure:   {Least: Viewer, Scoping: Within, Note: "as ListRollouts"},
	v1connect.RolloutServiceControlRolloutProcedure: {Least: Operator, Scoping: Within, Note: "of a Deployment whose selector includes the scope"},
	v1connect.RolloutServiceListDecisionsProcedure:  {Least: Viewer, Scoping: Within, Note: "as ListRollouts"},

	v1connect.DeviceServiceListDevicesProcedure:   {Least: Viewer, Scoping: Within},
	v1connect.DeviceServiceRemoveDeviceProcedure:  {Least: Admin, Scoping: Within},
	v1connect.DeviceServiceRevokeDeviceProcedure:  {Least: Admin, Scoping: Within},
	v1connect.DeviceServiceListEventsProcedure:    {Least: Viewer, Scoping: Within},
	v1connect.DeviceServiceListDriftProcedure:     {Least: Viewer, Scoping: Within},
	v1connect.DeviceServiceListTelemetryProcedure: {Least: Viewer, Scoping: Within},

	RegistryList: {Least: Viewer},
	RegistryPull: {Least: Viewer, Devices: true, Note: "devices: the models that a deployment gives them, or, where they are its cache, a device of their site"},
	RegistryPush: {Least: Operator},

	Health:  {},
	Metrics: {Least: Viewer, Scoping: Whole},

	ConsoleDoor:  {},
	ConsolePages: {Least: Viewer, Scoping: Within, Note: "they show and do what the calls they make answer"},
}

// Actions gives every action that there is a rule for, by name.
func Actions() []string { return slices.Sorted(maps.Keys(rules)) }

// RuleOf gives the rule of an action; false: there is none.
func RuleOf(action string) (Rule, bool) {
	r, ok := rules[action]
	return r, ok
}

// DeniedError says what somebody lacks for an action.
type DeniedError struct {
	Who    Principal
	Action string
	Lacks  string
}

func (e *DeniedError) Error() string { return e.Who.String() + " " + e.Lacks }

// Allow says whether p may do something: nil, ErrUnauthenticated for nobody,
// or a DeniedError. Each of labels is those of a device, or a selector, that
// it is about; they must include the scope of p.
func Allow(p Principal, action string, labels ...map[string]string) error {
	rule, ok := rules[action]
	denied := func(format string, args ...any) error {
		return &DeniedError{Who: p, Action: action, Lacks: fmt.Sprintf(format, args...)}
	}
	switch {
	case ok && rule.Least == Anyone, ok && rule.Devices && p.Kind == Device:
		return nil
	case p.Kind == 0:
		return fmt.Errorf("%w: credentials are missing or wrong", ErrUnauthenticated)
	case !ok:
		return denied("lacks a rule for %s", action)
	case !p.May(rule.Least):
		return denied("lacks the role %s", rule.Least)
	case rule.Scoping == Whole && len(p.Scope) > 0:
		return denied("has the scope %s, this is for those who have none", LabelsText(p.Scope))
	case rule.Scoping == Within && slices.ContainsFunc(labels, func(l map[string]string) bool { return !p.Covers(l) }):
		return denied("may do this only where %s", LabelsText(p.Scope))
	}
	return nil
}
