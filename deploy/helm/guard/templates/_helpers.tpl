{{- define "guard.fullname" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* The labels by which pods are found; the argument is a list of the context and the component. */}}
{{- define "guard.selector" -}}
app.kubernetes.io/name: {{ (index . 0).Chart.Name }}
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{- define "guard.labels" -}}
{{ include "guard.selector" . }}
app.kubernetes.io/version: {{ (index . 0).Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ (index . 0).Release.Service }}
helm.sh/chart: {{ printf "%s-%s" (index . 0).Chart.Name (index . 0).Chart.Version }}
{{- end -}}

{{/* What cannot be, said before anything is installed. */}}
{{- define "guard.check" -}}
{{- $sidecar := eq .Values.mode "sidecar" -}}
{{- if and .Values.policies.files .Values.policies.configMap -}}
{{- fail "policies: files or configMap, not both" -}}
{{- end -}}
{{- if and $sidecar (not .Values.sidecar.backend) -}}
{{- fail "sidecar.backend: the container of the backend is needed" -}}
{{- end -}}
{{- if and $sidecar (or .Values.tls.secret .Values.gateway.enabled .Values.autoscaling.enabled) -}}
{{- fail "tls, gateway and autoscaling are of mode: service" -}}
{{- end -}}
{{- if and .Values.tls.mutual (not .Values.tls.secret) -}}
{{- fail "tls.mutual needs tls.secret" -}}
{{- end -}}
{{- if and .Values.gateway.enabled (ne (not .Values.tls.secret) (not .Values.gateway.tlsSecret)) -}}
{{- fail "tls.secret and gateway.tlsSecret go together" -}}
{{- end -}}
{{- end -}}

{{/* A pod that asks a Guard elsewhere runs none. */}}
{{- define "guard.runs" -}}
{{- if not (and (eq .Values.mode "sidecar") .Values.sidecar.options.guard) }}true{{ end -}}
{{- end -}}

{{- define "guard.image" -}}
{{ printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) }}
{{- end -}}

{{/* YAML knows no whole numbers; 104857600 would come out as 1.048576e+08. */}}
{{- define "guard.text" -}}
{{- if and (kindIs "float64" .) (eq (floor .) .) -}}{{ int64 . }}{{- else -}}{{ . }}{{- end -}}
{{- end -}}

{{- define "guard.security" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
capabilities: {drop: [ALL]}
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{/* Is it ready to judge? Of TLS the kubelet knows HTTPS alone. */}}
{{- define "guard.ready" -}}
{{- if eq .Values.mode "sidecar" -}}
{{- if include "guard.runs" . -}}
httpGet: {path: /healthz, port: http}
{{- else -}}
tcpSocket: {port: proxy}
{{- end -}}
{{- else if .Values.tls.secret -}}
httpGet: {path: /healthz, port: http, scheme: HTTPS}
{{- else -}}
grpc: {port: 50051}
{{- end -}}
{{- end -}}

{{- define "guard.env" -}}
{{- range $name, $value := .Values.settings }}
- {name: GUARD_{{ upper $name }}, value: {{ include "guard.text" $value | quote }}}
{{- end }}
{{- if not (hasKey .Values.settings "threads") }}
- name: GUARD_THREADS
  valueFrom: {resourceFieldRef: {resource: requests.cpu, divisor: "1"}}
{{- end }}
{{- if .Values.gpu.enabled }}
- {name: GUARD_DEVICE, value: cuda}
{{- end }}
{{- if eq .Values.mode "sidecar" }}
- {name: GUARD_HTTP, value: "0.0.0.0:9090"}
{{- end }}
{{- if or .Values.policies.files .Values.policies.configMap }}
- {name: GUARD_POLICIES, value: /etc/guard/policies}
{{- end }}
{{- range $name, $file := .Values.files }}
- {name: GUARD_{{ upper $name }}, value: {{ printf "/etc/guard/%s/%s" $name $file.key | quote }}}
{{- end }}
{{- if .Values.tls.secret }}
- {name: GUARD_TLS_CERT, value: /etc/guard/tls/tls.crt}
- {name: GUARD_TLS_KEY, value: /etc/guard/tls/tls.key}
{{- if .Values.tls.mutual }}
- {name: GUARD_TLS_CLIENT_CA, value: /etc/guard/tls/ca.crt}
{{- end }}
{{- end }}
{{- end -}}

{{/* Directories, never a subPath, which would not change with what it is of. */}}
{{- define "guard.mounts" -}}
- {name: tmp, mountPath: /tmp}
{{- if or .Values.policies.files .Values.policies.configMap }}
- {name: policies, mountPath: /etc/guard/policies, readOnly: true}
{{- end }}
{{- range $name, $_ := .Values.files }}
- {name: {{ $name | replace "_" "-" }}, mountPath: /etc/guard/{{ $name }}, readOnly: true}
{{- end }}
{{- if .Values.tls.secret }}
- {name: tls, mountPath: /etc/guard/tls, readOnly: true}
{{- end }}
{{- with .Values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "guard.volumes" -}}
- {name: tmp, emptyDir: {sizeLimit: 1Gi}}
{{- if or .Values.policies.files .Values.policies.configMap }}
- name: policies
  configMap:
    name: {{ .Values.policies.configMap | default (printf "%s-policies" (include "guard.fullname" .)) }}
{{- end }}
{{- range $name, $file := .Values.files }}
- {name: {{ $name | replace "_" "-" }}, secret: {secretName: {{ $file.secret }}, defaultMode: 0444}}
{{- end }}
{{- if .Values.tls.secret }}
- {name: tls, secret: {secretName: {{ .Values.tls.secret }}, defaultMode: 0444}}
{{- end }}
{{- with .Values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* `guard serve`, or in a pod with a backend `guard sidecar`. */}}
{{- define "guard.container" -}}
{{- $sidecar := eq .Values.mode "sidecar" -}}
{{- $resources := deepCopy .Values.resources -}}
{{- if .Values.gpu.enabled -}}
{{- $resources = mustMergeOverwrite $resources (dict "limits" (dict "nvidia.com/gpu" 1)) -}}
{{- end -}}
name: guard
image: {{ include "guard.image" . | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
args:
{{- if $sidecar }}
  - sidecar
  - {{ printf "--upstream=%s" .Values.sidecar.upstream | quote }}
  - {{ printf "--bind=0.0.0.0:%v" .Values.sidecar.port | quote }}
{{- range $name, $value := .Values.sidecar.options }}
  {{- if kindIs "bool" $value }}
  - --{{ $value | ternary "" "no-" }}{{ $name | replace "_" "-" }}
  {{- else }}
  - {{ printf "--%s=%s" ($name | replace "_" "-") (include "guard.text" $value) | quote }}
  {{- end }}
{{- end }}
{{- else }}
  - serve
{{- end }}
env:
  {{- include "guard.env" . | nindent 2 }}
ports:
{{- if $sidecar }}
  - {name: proxy, containerPort: {{ .Values.sidecar.port }}}
{{- else }}
  - {name: grpc, containerPort: 50051}
{{- end }}
{{- if include "guard.runs" . }}
  - {name: http, containerPort: 9090}
{{- end }}
# Until it is ready for the first time nobody asks whether it lives.
startupProbe:
  {{- if $sidecar }}
  tcpSocket: {port: proxy} # Envoy comes up once Guard serves
  {{- else }}
  {{- include "guard.ready" . | nindent 2 }}
  {{- end }}
  periodSeconds: 2
  timeoutSeconds: 2
  failureThreshold: {{ div (add .Values.startupSeconds 1) 2 }}
readinessProbe:
  {{- include "guard.ready" . | nindent 2 }}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 2
# Overload is answered with refusals, and health stays what it was; a minute without a word is another thing.
livenessProbe:
  {{- include "guard.ready" . | nindent 2 }}
  periodSeconds: 10
  timeoutSeconds: 10
  failureThreshold: 6
# It stops taking calls as soon as it is told to; before that those who send them should know.
lifecycle:
  preStop:
    sleep: {seconds: {{ .Values.preStopSeconds }}}
resources:
  {{- toYaml $resources | nindent 2 }}
securityContext:
  {{- include "guard.security" . | nindent 2 }}
volumeMounts:
  {{- include "guard.mounts" . | nindent 2 }}
{{- end -}}

{{/* Where pods go: not all on one node, nor in one zone. */}}
{{- define "guard.spread" -}}
{{- range list "topology.kubernetes.io/zone" "kubernetes.io/hostname" }}
- maxSkew: 1
  topologyKey: {{ . }}
  whenUnsatisfiable: ScheduleAnyway
  labelSelector:
    matchLabels:
      {{- include "guard.selector" $ | nindent 6 }}
{{- end }}
{{- end -}}
