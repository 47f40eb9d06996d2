#include "lminf-rpc.h"

#ifdef _WIN32
#  include <winsock2.h>
#  include <ws2tcpip.h>
#else
#  include <netinet/in.h>
#  include <netinet/tcp.h>
#  include <sys/socket.h>
#endif

uint8_t lminf_rpc_version(int32_t i) {
    return (uint8_t) ((LMINF_RPC_BUILD | 0x800000) >> 8*(2 - i));
}

static void set_option(intptr_t sockfd, int level, int name, int value) {
    // where a system has no such option its defaults hold
#ifdef _WIN32
    setsockopt((SOCKET) sockfd, level, name, (const char *) &value, sizeof(value));
#else
    setsockopt((int) sockfd, level, name, &value, sizeof(value));
#endif
}

bool lminf_rpc_keep_alive(intptr_t sockfd) {
    // while nothing is on its way: after 15 s of silence one question every 5 s, and the third without an answer ends it
    set_option(sockfd, SOL_SOCKET, SO_KEEPALIVE, 1);
#if defined(TCP_KEEPIDLE)
    set_option(sockfd, IPPROTO_TCP, TCP_KEEPIDLE, 15);
#elif defined(TCP_KEEPALIVE)
    set_option(sockfd, IPPROTO_TCP, TCP_KEEPALIVE, 15);
#endif
#ifdef TCP_KEEPINTVL
    set_option(sockfd, IPPROTO_TCP, TCP_KEEPINTVL, 5);
#endif
#ifdef TCP_KEEPCNT
    set_option(sockfd, IPPROTO_TCP, TCP_KEEPCNT, 3);
#endif

    // while something is
#if defined(TCP_USER_TIMEOUT)
    set_option(sockfd, IPPROTO_TCP, TCP_USER_TIMEOUT, 30*1000);
#elif defined(TCP_RXT_CONNDROPTIME)
    set_option(sockfd, IPPROTO_TCP, TCP_RXT_CONNDROPTIME, 30);
#elif defined(TCP_MAXRT)
    set_option(sockfd, IPPROTO_TCP, TCP_MAXRT, 30);
#endif

    return true;
}
