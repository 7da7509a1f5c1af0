package org.pytorch.serve.http;

import io.netty.channel.ChannelDuplexHandler;
import io.netty.channel.ChannelHandlerContext;
import io.netty.channel.ChannelPromise;
import io.netty.handler.codec.http.LastHttpContent;
import io.netty.util.ReferenceCountUtil;
import java.util.ArrayDeque;
import java.util.Queue;

/**
 * Lets a connection's next request pass when the answer to the one before has been sent. TorchServe takes all that come, so
 * that a client that sends one after another and reads no answer fills its memory with answers, and one that reads them
 * gets them in the order in which they are ready.
 */
class OneAtATime extends ChannelDuplexHandler {
    /** What had been read before reading was stopped: no more than lay in one buffer of the socket's. */
    private final Queue<Object> waiting = new ArrayDeque<>();

    private boolean inHand;

    @Override
    public void channelRead(ChannelHandlerContext context, Object request) {
        if (inHand) {
            waiting.add(request);
            context.channel().config().setAutoRead(false);
        } else {
            pass(context, request);
        }
    }

    @Override
    public void write(ChannelHandlerContext context, Object answer, ChannelPromise promise) {
        if (answer instanceof LastHttpContent) {
            promise = promise.unvoid();
            promise.addListener(sent -> context.executor().execute(() -> next(context)));
        }
        context.write(answer, promise);
    }

    @Override
    public void channelInactive(ChannelHandlerContext context) {
        waiting.forEach(ReferenceCountUtil::release);
        waiting.clear();
        context.fireChannelInactive();
    }

    private void pass(ChannelHandlerContext context, Object request) {
        inHand = true;
        context.fireChannelRead(request);
    }

    private void next(ChannelHandlerContext context) {
        inHand = false;
        if (!waiting.isEmpty() && context.channel().isActive()) {
            pass(context, waiting.remove());
        }
        context.channel().config().setAutoRead(waiting.isEmpty());
    }
}
